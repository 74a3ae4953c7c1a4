"""Which class of transformers a configuration stands for. Every loader asks here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
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

OWN_CODE = (
    "whose code comes with the model (auto_map): such code is never run here, use a version of the model for "
    "transformers' own classes"
)

# What a model is that computes something else than a causal language model, in the order of the questions.
_KINDS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "an encoder-decoder": lambda config: bool(getattr(config, "is_encoder_decoder", False)),
        # Configurations of encoders alone have both; as a decoder such a model says so.
        "an encoder": lambda config: (
            hasattr(config, "add_cross_attention") and getattr(config, "is_decoder", None) is False
        ),
    }
)


def model_class(config: Any, where: str, causal: bool) -> Any:
    """The class of transformers whose ``from_pretrained`` makes the model that a configuration describes.

    Args:
        config: of the model, as ``AutoConfig`` reads it.
        where: the model's name, for messages.
        causal: whether the caller needs a causal language model. Of a model that also sees or hears it gets the
            language model, if transformers has a class for it.

    Returns:
        The class that ``architectures`` names, or ``AutoModelForCausalLM``, which makes the same or is asked for.

    Raises:
        SmoothQuantError: there is no such class, or it is no causal language model where ``causal`` asks for one.
    """
    name = _named(config)
    named = _find(name, config)
    mapped = _in_table(AutoModelForCausalLM, config)
    if name is not None and named is None:
        if hasattr(transformers, name):
            raise SmoothQuantError(
                f"{where}: config.json says model_type {config.model_type!r}, but architectures {name}, which is of "
                "another type; correct one of them"
            )
        if mapped is None or not _is_causal(name):
            raise SmoothQuantError(f"{where}: config.json names the class {name}, {_absent(config)}")
    if not causal and named is not None:
        return AutoModelForCausalLM if named is mapped else named
    kind = next((f", {kind}" for kind, is_it in _KINDS.items() if is_it(config)), "")
    if mapped is None or kind or not _computes_the_same(named, mapped, config):
        what = name or f"of type {config.model_type!r}"
        raise SmoothQuantError(
            f"{where} is {what}{kind}; name a causal language model, as LlamaForCausalLM is one: no other kind is "
            "supported here"
        )
    if named is not None and named is not mapped:
        part = "is its language model alone" if is_multimodal(config) else "takes the token embedding as its output"
        warnings.warn(f"{where} is {name}: read as {mapped.__name__}, which {part}", stacklevel=2)
    return AutoModelForCausalLM


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
    head = model.get_output_embeddings()
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


def _computes_the_same(named: type[PreTrainedModel] | None, mapped: type[PreTrainedModel], config: Any) -> bool:
    """Whether the causal language model is what is named, a part of it, or it with an output embedding on top."""
    return named is None or named is mapped or is_multimodal(config) or named is _in_table(AutoModel, config)


def _absent(config: Any) -> str:
    """The end of a sentence about a class that transformers does not have."""
    own = config.get("auto_map") if isinstance(config, Mapping) else getattr(config, "auto_map", None)
    if own:
        return OWN_CODE
    return f"which transformers {transformers.__version__} does not have; pip install -U transformers"
