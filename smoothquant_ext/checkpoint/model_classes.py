"""Which class of transformers a configuration stands for. Every loader asks here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ..errors import SmoothQuantError
from ..nn.embedding import shares_head
from ..nn.linear import W8A8Linear
from ..traits import embedding_of

OWN_CODE = (
    "whose code comes with the model (auto_map): such code is never run here, use a version of the model for "
    "transformers' own classes"
)

# The auto classes of each task, which have the names of transformers' pipelines, where there is one. A class in several
# tables is of the first task.
TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text-generation": ("AutoModelForCausalLM",),
        "image-text-to-text": ("AutoModelForImageTextToText",),
        "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
        "text2text-generation": ("AutoModelForSeq2SeqLM",),
        "fill-mask": ("AutoModelForMaskedLM",),
        "text-classification": ("AutoModelForSequenceClassification",),
        "token-classification": ("AutoModelForTokenClassification",),
        "question-answering": ("AutoModelForQuestionAnswering",),
        "multiple-choice": ("AutoModelForMultipleChoice",),
        "audio-classification": ("AutoModelForAudioClassification",),
        "image-classification": ("AutoModelForImageClassification",),
        "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
        "object-detection": ("AutoModelForObjectDetection",),
        "image-segmentation": ("AutoModelForSemanticSegmentation", "AutoModelForImageSegmentation"),
        "depth-estimation": ("AutoModelForDepthEstimation",),
        "video-classification": ("AutoModelForVideoClassification",),
        "feature-extraction": ("AutoModel",),
    }
)
CAUSAL_LM, EMBEDDING = "text-generation", "feature-extraction"


def model_class(config: Any, where: str, task: str | None = None) -> Any:
    """The class of transformers whose ``from_pretrained`` makes the model that a configuration describes.

    Args:
        config: of the model, as ``AutoConfig`` reads it.
        where: the model's name, for messages.
        task: what the model is to do, by the name of transformers' pipeline. Of a model that also sees or hears,
            ``"text-generation"`` is the language model alone, if transformers has a class for it.

    Returns:
        The class that ``architectures`` names, or that its type has for the task; ``AutoModelForCausalLM`` for the same
        class, because it also loads the language model of a larger one.

    Raises:
        SmoothQuantError: there is no such class.
    """
    name = _named(config)
    named = _find(name, config)
    causal = _in_table(AutoModelForCausalLM, config)
    if name is not None and named is None:
        if hasattr(transformers, name):
            raise SmoothQuantError(
                f"{where}: config.json says model_type {config.model_type!r}, but architectures {name}, which is of "
                "another type; correct one of them"
            )
        if causal is None or not _is_causal(name):
            raise SmoothQuantError(f"{where}: config.json names the class {name}, {_absent(config)}")
    if task is not None:
        found = _class_for(task, config, where)
    elif named is not None or causal is not None:
        found = named or (_in_table(AutoModel, config) if _is_encoder(config) else causal)
    else:
        found = _in_table(AutoModel, config)
    if found is None:
        raise SmoothQuantError(f"{where} is of type {config.model_type!r}, of which transformers has no model")
    if task is not None and named not in (None, found):
        warnings.warn(f"{where} is {name}: read as {found.__name__}{_what_that_is(named, found, config)}", stacklevel=2)
    return AutoModelForCausalLM if found is causal else found


def task_of(name: str) -> tuple[str | None, str]:
    """The task of the class of that name, if any, and the auto class that makes it."""
    for task, autos in TASKS.items():
        for auto in autos:
            table = getattr(getattr(transformers, auto), "_model_mapping", None)
            named = table._model_mapping.values() if table is not None else ()
            if any(name == each or (not isinstance(each, str) and name in each) for each in named):
                return task, auto
    return None, name


def reads_text_alone(kind: Any) -> bool:
    """Whether a class that ``model_class`` returns reads text and nothing else."""
    return kind is AutoModelForCausalLM or getattr(kind, "input_modalities", "text") in ("text", ("text",), ["text"])


def _class_for(task: str, config: Any, where: str) -> Any:
    if task not in TASKS:
        raise SmoothQuantError(f"there is no task {task!r}, expected one of {', '.join(TASKS)}")
    found = {name: _first_in_tables(autos, config) for name, autos in TASKS.items()}
    if found[task] is None:
        others = ", ".join(name for name, each in found.items() if each is not None) or "none"
        raise SmoothQuantError(
            f"{where} is {_named(config) or config.model_type}: transformers has no class of its type for the task "
            f"{task}; it has one for {others}"
        )
    return found[task]


def _first_in_tables(autos: tuple[str, ...], config: Any) -> Any:
    each = (_in_table(getattr(transformers, auto), config) for auto in autos)
    return next((found for found in each if found is not None), None)


def _what_that_is(named: Any, found: Any, config: Any) -> str:
    if found is not _in_table(AutoModelForCausalLM, config):
        return ""
    if is_multimodal(config):
        return ", which is its language model alone"
    return ", which takes the token embedding as its output" if named is _in_table(AutoModel, config) else ""


def _is_encoder(config: Any) -> bool:
    """Whether a configuration that names no class is of an encoder, or has one."""
    is_no_decoder = hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", None) is False
    return bool(getattr(config, "is_encoder_decoder", False)) or is_no_decoder


def check_continues_text(config: Any, where: str) -> None:
    """Refuses a configuration of a model that a server of language models cannot run.

    Raises:
        SmoothQuantError: it is no causal language model, nor one that also sees or hears.
    """
    kind = model_class(config, where)
    if kind is not AutoModelForCausalLM and not is_multimodal(config):
        raise SmoothQuantError(does_not_continue(where, kind.__name__))


def does_not_continue(where: str, kind: str) -> str:
    """The sentence about a model that cannot be asked to continue a text."""
    return (
        f"{where} is {kind}, which does not continue texts; run it with transformers' pipelines or "
        "sentence-transformers, after smoothquant_ext.enable()"
    )


def check_known(raw: Mapping[str, Any], where: str) -> None:
    """Refuses a config.json whose type of model transformers does not have.

    Raises:
        SmoothQuantError: the type is missing, unknown, or computed by code that comes with the model.
    """
    kind = raw.get("model_type")
    if kind is None and not raw.get("auto_map"):
        raise SmoothQuantError(f"{where}: config.json has no model_type, which says what the model is; add it there")
    if kind not in transformers.CONFIG_MAPPING:
        raise SmoothQuantError(f"{where}: config.json says model_type {kind!r}, {_absent(raw)}")


def check_loadable(model: PreTrainedModel) -> None:
    """Refuses a model that ``load`` could not build again from what ``save`` writes.

    Raises:
        SmoothQuantError: transformers does not know its class, or its configuration by its type; or its output
            embedding is in 8 bits, which unties it, and its configuration would untie others with it.
    """
    kind, config = type(model), model.config
    head = embedding_of(model, "output")
    path = next((f"{path}." for path, module in model.named_modules() if module is head), "")
    tied = [name for name in getattr(model, "all_tied_weights_keys", {}) if not name.startswith(path)]
    if isinstance(head, W8A8Linear) and tied and not shares_head(model):
        raise SmoothQuantError(
            f"{kind.__name__} cannot be saved with {path[:-1]} in 8 bits, because config.json would then untie "
            f"{tied[0]} too; leave {path[:-1]} in floating point"
        )
    table = transformers.CONFIG_MAPPING
    if config.model_type not in table or table[config.model_type] is not type(config):
        problem = f"its configuration, {type(config).__name__}, is not one that transformers finds by its model_type"
    elif _find(kind.__name__, config) is not kind:
        problem = "transformers has no class of that name for its configuration"
    else:
        return
    raise SmoothQuantError(f"{kind.__name__} cannot be saved, because it could not be loaded again: {problem}")


def is_multimodal(config: Any) -> bool:
    """Whether a configuration is of a model that reads images or sound besides text, and writes text."""
    return _named(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def _named(config: Any) -> str | None:
    """The first of ``architectures``."""
    names = getattr(config, "architectures", None) or []
    return str(names if isinstance(names, str) else names[0]) if names else None


def _find(name: str | None, config: Any) -> type[PreTrainedModel] | None:
    """The class of that name for that configuration; parts of larger models are in the module of theirs only."""
    if name is None:
        return None
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    candidates: list[Any] = [_in_table(AutoModelForCausalLM, config), _in_table(AutoModel, config)]
    candidates += [getattr(transformers, name, None)]
    if module.startswith("transformers."):
        candidates += [getattr(importlib.import_module(module), name, None)]
    for found in candidates:
        if getattr(found, "__name__", None) == name and issubclass(found, PreTrainedModel):
            fits = found is candidates[0] or issubclass(type(config), found.config_class or ())
            return found if fits else None
    return None


def _in_table(auto_class: Any, config: Any) -> Any:
    """The class, if any, that an auto class makes of a configuration; of several the one of ``architectures``."""
    try:
        found = auto_class._model_mapping[type(config)]
    except (KeyError, AttributeError, ImportError):
        return None
    several = found if isinstance(found, list | tuple) else (found,)
    return next((each for each in several if each.__name__ == _named(config)), several[0])


def _is_causal(name: str) -> bool:
    return name.endswith(("ForCausalLM", "LMHeadModel")) or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _absent(config: Any) -> str:
    """The end of a sentence about a class that transformers does not have."""
    own = config.get("auto_map") if isinstance(config, Mapping) else getattr(config, "auto_map", None)
    if own:
        return OWN_CODE
    return f"which transformers {transformers.__version__} does not have; pip install -U transformers"
