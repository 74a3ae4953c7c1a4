"""Loads a model from a directory, a hub id or a GGUF file, in floating point or W8A8."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from .checkpoint import loading
from .checkpoint.completeness import (
    is_dropped,
    load_complete,
    only_complete_models,
    unexpected_tensors,
)
from .checkpoint.formats.registry import config_files
from .checkpoint.model_classes import EMBEDDING, OWN_CODE, check_continues_text, model_class, reads_text_alone
from .checkpoint.other_files import MODULES, folders_of_modules
from .checkpoint.reading import COPY_AGAIN, INDEX, find_quantization, read_json
from .checkpoint.source_files import check_directory, check_experts, gguf_names, stored_names, superfluous_blocks
from .compat import first_line, quiet_transformers
from .devices import loaded_on, move_
from .errors import SmoothQuantError
from .traits import embedding_of

# What some errors of transformers and torch mean for a user, by a part of their text.
_REASONS = {
    "trust_remote_code": f"is one {OWN_CODE}",
    "Weights only load failed": "has .bin files that hold more than tensors, and such pickles are never run; take the "
    "model in safetensors",
}
OTHER_WEIGHTS = ["consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*"]
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.spm", "*.codes"]


@dataclass(frozen=True)
class _Request:
    """What a user asks for: the model's name, for messages, and the arguments of ``load_model``."""

    name: str
    dtype: torch.dtype | None
    device: torch.device | str | None
    drop: Sequence[str]
    as_w8a8: bool = False
    task: str | None = None


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    drop: Sequence[str] = (),
    as_w8a8: bool = False,
    task: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Loads a model of transformers, and what prepares its input: a tokenizer, or the processor of images or sound.

    The files must hold exactly the tensors that the model needs: transformers would fill in random numbers.

    Args:
        source: a directory written by ``save_pretrained`` or ``smoothquant_ext.save``, the path of a .gguf file (which
            is dequantized), or the id of a model on the Hugging Face hub.
        dtype: dtype of the floating-point weights; ``None`` takes the checkpoint's, for GGUF float32.
        device: the device to load to, by default the CPU. With accelerate installed the weights are read straight to a
            GPU, and a model that is too large for it is spread over main memory too.
        drop: shell patterns like ``"mtp.*"`` for names of tensors that the model has no place for and that may be left
            out.
        as_w8a8: as in ``checkpoint.loading.load``.
        task: what the model is to do, by the name of transformers' pipeline, such as ``"text-generation"`` or
            ``"feature-extraction"``; ``None`` takes the class that config.json names.

    Returns:
        The model in evaluation mode, with ``W8A8Linear`` layers if the source is a W8A8 checkpoint; and the tokenizer
        of a model that reads text, the processor of another.

    Raises:
        SmoothQuantError: the model does not exist, has no class for the task, lacks tensors, holds others than it
            needs, cannot be loaded by transformers, or has no tokenizer or processor.
    """
    path = Path(source)
    request = _Request(str(source) if not path.is_dir() else str(path), dtype, device, tuple(drop), as_w8a8, task)
    with quiet_transformers():
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            return _load_gguf(path, request)
        if path.is_dir():
            check_directory(path)
            return _load(request, path, find_quantization(path) is not None)
        if path.exists():
            raise SmoothQuantError(f"{path} is neither a directory nor a .gguf file; name a model's directory")
        return _load_from_hub(request)


def _load(request: _Request, source: Path | str, quantized: bool, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    unloadable = f"{request.name}: transformers cannot load this model"
    # The configuration is loaded first: an error in it would otherwise appear as one of the tokenizer. It is passed on
    # because a GGUF file takes seconds to parse.
    config = _call(unloadable, AutoConfig, source, **kwargs)
    if getattr(config, "quantization_config", None) == {}:  # transformers would miss its quant_method
        del config.quantization_config
    if (
        request.task is None
        and not quantized
        and "gguf_file" not in kwargs
        and _is_sentence_transformer(source, **kwargs)
    ):
        request = replace(request, task=EMBEDDING)  # as sentence-transformers loads it, whatever architectures says
    loader = model_class(config, request.name, request.task)
    reads_text = reads_text_alone(loader)
    processor = _processor(request.name, source, config, loader, **kwargs)
    if quantized:
        model = loading.load_as(source, request.device, request.dtype, request.drop, request.task, request.as_w8a8)
    else:
        stored: Collection[str] = ()
        if "gguf_file" in kwargs:
            stored = gguf_names(Path(source) / kwargs["gguf_file"])
            request = _without_superfluous_blocks(request, stored, config)
        else:
            # It quantizes no weights, and transformers would do what the warning says is not done.
            vars(config).pop("quantization_config", None)
            stored = stored_names(source) if isinstance(source, Path) else _names_on_hub(source, **kwargs)
            check_experts(request.name, stored)
        load = partial(_load_float, request, loader, source, stored, {"config": config, **kwargs})
        model = load({}) if "gguf_file" in kwargs else loaded_on(request.device, load)
        move_(model, request.device)
    if reads_text:
        _check_vocabulary(request.name, model, processor)
    return model, processor


def _is_sentence_transformer(source: Path | str, **kwargs: Any) -> bool:
    return (source / MODULES).is_file() if isinstance(source, Path) else _cached(source, MODULES, **kwargs) is not None


def _processor(name: str, source: Path | str, config: Any, kind: Any, **kwargs: Any) -> Any:
    """What prepares the input of a class of models: a tokenizer, or what transformers has for images and sound."""
    if reads_text_alone(kind):
        no_tokenizer = f"{name} has no tokenizer that transformers can load"
        return _call(no_tokenizer, AutoTokenizer, source, config=config, **kwargs)
    try:
        return _call(f"{name} has no processor that transformers can load", AutoProcessor, source, **kwargs)
    except SmoothQuantError:  # it may have a part of one: of a model that reads text and images the tokenizer will do
        is_text = getattr(kind, "main_input_name", "input_ids") == "input_ids"
        for auto_class in (AutoTokenizer,) if is_text else (AutoImageProcessor, AutoFeatureExtractor):
            with suppress(SmoothQuantError):
                return _call(name, auto_class, source, **kwargs)
        raise


def _without_superfluous_blocks(request: _Request, names: Collection[str], config: Any) -> _Request:
    """The request for a GGUF file without the patterns for blocks beyond the header's number, which have to go."""
    extra = superfluous_blocks(names, config.get_text_config().num_hidden_layers)
    left = [name for name in extra if not is_dropped(name, request.drop)]
    if left:
        needed = set(names) - set(extra)
        raise SmoothQuantError(unexpected_tensors(request.name, "the model of its header", left, needed))
    drop = [pattern for pattern in request.drop if not any(is_dropped(name, [pattern]) for name in extra)]
    return replace(request, drop=drop)


def _load_float(
    request: _Request,
    loader: Any,
    source: Path | str,
    stored: Collection[str],
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """A complete model in floating point; ``arguments`` and ``options`` are for ``from_pretrained``."""
    unloadable = f"{request.name}: transformers cannot load this model"
    with _said_of(request.name, unloadable):
        model = load_complete(
            loader,
            source,
            request.drop,
            stored,
            dtype=request.dtype or "auto",
            trust_remote_code=False,
            **arguments,
            **options,
        )
    return model.eval()


def _load_gguf(path: Path, request: _Request) -> tuple[PreTrainedModel, Any]:
    if not path.is_file():
        raise SmoothQuantError(f"{path} does not exist; name an existing .gguf file")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SmoothQuantError(f"{path} needs the package {package} to be read; install smoothquant-ext[gguf]")
    request = replace(request, dtype=request.dtype or torch.float32)
    model, tokenizer = _load(request, path.parent, False, gguf_file=path.name)
    # transformers dequantized the weights while loading, so from here on this is a float model.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, tokenizer


def _load_from_hub(request: _Request) -> tuple[PreTrainedModel, Any]:
    name = request.name
    config, offline = _config_from_hub(name)
    if not _is_quantized(name, config, offline):
        return _load(request, name, False, local_files_only=offline)
    try:
        directory = snapshot_download(name, allow_patterns=CHECKPOINT_FILES, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{name} cannot be downloaded from the hub ({first_line(error)})") from error
    return _load(request, Path(directory), find_quantization(Path(directory)) is not None)


def _config_from_hub(name: str) -> tuple[Any, bool]:
    """The configuration of a model on the hub, and whether it came from the hub's cache because there is no network."""
    absent = f"{name} is neither a directory here nor a model on the hub"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise SmoothQuantError(f"{absent}; name a directory, a .gguf file or a hub id like 'namespace/name'")
    # Without a network the hub's client would retry for half a minute. Models in its cache still load.
    offline = _is_offline()
    return _call(f"{absent} that can be reached", AutoConfig, name, local_files_only=offline), offline


def _names_on_hub(name: str, **options: Any) -> Collection[str]:
    """The names of a model's tensors, from its index; none for a model in one file, which has no index."""
    index = _cached(name, INDEX, **options)
    return () if index is None else read_json(Path(index), COPY_AGAIN).get("weight_map", {})


@contextmanager
def loads_as_here(source: str, drop: Sequence[str] = ()) -> Iterator[None]:
    """Within it transformers, or a server that calls it, loads ``source`` by the rules of ``load_model`` or not at all.

    Args:
        source: a directory or a hub id.
        drop: as for ``load_model``.

    Raises:
        SmoothQuantError: as ``load_model``, or the model does not continue texts.
    """
    path = Path(source)
    with quiet_transformers():
        if path.is_dir():
            check_directory(path)
            stored_names(path)
            config = _call(f"{path}: transformers cannot load this model", AutoConfig, path)
        else:
            config, _ = _config_from_hub(source)
    check_continues_text(config, source)
    with only_complete_models(drop):
        yield


def _check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Says if the tokenizer makes ids that the model has no embedding for."""
    embedding = embedding_of(model, "input")
    rows = getattr(embedding, "num_embeddings", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        warnings.warn(
            f"{name}: the tokenizer makes ids up to {largest} ({token!r}), but the model has embeddings for {rows} "
            "tokens: text with the others cannot be read",
            stacklevel=3,
        )


def _is_quantized(name: str, config: Any, offline: bool) -> bool:
    """Whether a model on the hub is quantized, by its config.json or by the file of a format beside it."""
    if getattr(config, "quantization_config", None) or getattr(config, "compression_config", None):
        return True
    return any(_cached(name, file, local_files_only=offline) is not None for file in config_files())


def _cached(name: str, file: str, **options: Any) -> str | None:
    """The path of a file of a model on the hub, after downloading it; ``None`` if there is no such file."""
    options |= {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cast("str | None", cached_file(name, file, **options))


def local_directory(source: str) -> Path:
    """The directory of a model: ``source``, or where all files of that model on the hub are, which are downloaded.

    Raises:
        SmoothQuantError: there is no such model.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise SmoothQuantError(f"{path} is not a directory; name the directory of a saved model")
    _, offline = _config_from_hub(source)
    try:
        directory = Path(snapshot_download(source, ignore_patterns=OTHER_WEIGHTS, local_files_only=offline))
        if folders := folders_of_modules(directory):  # of sentence-transformers, whose weights may be in any format
            patterns = [f"{folder}/*" for folder in folders]
            snapshot_download(source, allow_patterns=patterns, local_files_only=offline)
        return directory
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{source} cannot be downloaded from the hub ({first_line(error)})") from error


def _is_offline() -> bool:
    """Whether the hub's host name does not resolve. Behind a proxy, which resolves names itself, it returns False."""
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies() or endpoint.hostname is None:
        return False
    try:
        socket.getaddrinfo(endpoint.hostname, None)
    except OSError:
        return True
    return False


def _call(problem: str, auto_class: Any, source: Path | str, **kwargs: Any) -> Any:
    """Calls ``auto_class.from_pretrained``; any exception becomes a ``SmoothQuantError`` of one sentence."""
    with _said_of(source, problem):
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)


@contextmanager
def _said_of(source: Path | str, problem: str) -> Iterator[None]:
    """Turns what transformers raises about a model into a ``SmoothQuantError`` that begins with ``problem``."""
    try:
        yield
    except (SmoothQuantError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        for sign, reason in _REASONS.items():
            if sign in str(error):
                raise SmoothQuantError(f"{source} {reason}") from error
        raise SmoothQuantError(f"{problem} ({first_line(error)})") from error
