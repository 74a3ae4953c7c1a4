"""Loads a model from a directory, a hub id or a GGUF file, in floating point or W8A8."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .checkpoint import loading
from .checkpoint.formats.registry import config_files
from .checkpoint.reading import find_quantization
from .compat import first_line, quiet_transformers
from .devices import loaded_on, move_
from .errors import SmoothQuantError

CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def load_model(
    source: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer.

    Args:
        source: a directory written by ``save_pretrained`` or ``smoothquant_ext.save``, the path of a .gguf file (which
            is dequantized), or the id of a model on the Hugging Face hub.
        dtype: dtype of the floating-point weights; ``None`` takes the checkpoint's, for GGUF float32.
        device: the device to load to, by default the CPU. With accelerate installed the weights are read straight to a
            GPU, and a model that is too large for it is spread over main memory too.

    Returns:
        The model in evaluation mode, with ``W8A8Linear`` layers if the source is a W8A8 checkpoint, and the tokenizer.

    Raises:
        SmoothQuantError: the model does not exist, transformers cannot load it, or it has no tokenizer.
    """
    path = Path(source)
    with quiet_transformers():
        if path.suffix.lower() == ".gguf":
            return _load_gguf(path, dtype or torch.float32, device)
        if path.is_dir():
            quantized = find_quantization(path) is not None
            return _load(str(path), path, quantized, dtype, device)
        if path.exists():
            raise SmoothQuantError(f"{path} is neither a directory nor a .gguf file; name a model's directory")
        return _load_from_hub(str(source), dtype, device)


def _load(
    name: str,
    source: Path | str,
    quantized: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    unloadable = f"{name}: transformers cannot load this model"
    # The configuration is loaded first: an error in it would otherwise appear as one of the tokenizer. It is passed on
    # because a GGUF file takes seconds to parse.
    config = _call(unloadable, AutoConfig, source, **kwargs)
    no_tokenizer = f"{name} has no tokenizer that transformers can load"
    tokenizer = _call(no_tokenizer, AutoTokenizer, source, config=config, **kwargs)
    if quantized:
        return loading.load(source, device, dtype), tokenizer

    def load(options: Mapping[str, Any]) -> PreTrainedModel:
        model: PreTrainedModel = _call(
            unloadable, AutoModelForCausalLM, source, config=config, dtype=dtype or "auto", **options, **kwargs
        )
        return model.eval()

    model = load({}) if "gguf_file" in kwargs else loaded_on(device, load)
    move_(model, device)
    return model, tokenizer


def _load_gguf(
    path: Path, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not path.is_file():
        raise SmoothQuantError(f"{path} does not exist; name an existing .gguf file")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SmoothQuantError(f"{path} needs the package {package} to be read; install smoothquant-ext[gguf]")
    model, tokenizer = _load(str(path), path.parent, False, dtype, device, gguf_file=path.name)
    # transformers dequantized the weights while loading, so from here on this is a float model.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, tokenizer


def _load_from_hub(
    name: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    absent = f"{name} is neither a directory here nor a model on the hub"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise SmoothQuantError(f"{absent}; name a directory, a .gguf file or a hub id like 'namespace/name'")
    # Without a network the hub's client would retry for half a minute. Models in its cache still load.
    offline = _is_offline()
    config = _call(f"{absent} that can be reached", AutoConfig, name, local_files_only=offline)
    if not _is_quantized(name, config, offline):
        return _load(name, name, False, dtype, device, local_files_only=offline)
    try:
        directory = snapshot_download(name, allow_patterns=CHECKPOINT_FILES, local_files_only=offline)
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{name} cannot be downloaded from the hub ({first_line(error)})") from error
    return _load(name, Path(directory), True, dtype, device)


def _is_quantized(name: str, config: Any, offline: bool) -> bool:
    """Whether a model on the hub is quantized, by its config.json or by the file of a format beside it."""
    if getattr(config, "quantization_config", None) or getattr(config, "compression_config", None):
        return True
    options = {
        "local_files_only": offline,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return any(cached_file(name, file, **options) is not None for file in config_files())


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
    try:
        return auto_class.from_pretrained(source, trust_remote_code=False, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise SmoothQuantError(f"{problem} ({first_line(error)})") from error
