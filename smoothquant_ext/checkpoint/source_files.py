"""Looks at the files of a model's directory before transformers does, and says what it is where it is no model."""

from __future__ import annotations

import importlib
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import SmoothQuantError
from .completeness import counted, name_families
from .model_classes import check_known
from .reading import COPY_AGAIN, INDEX, WEIGHTS, read_config, read_headers, read_json

ADAPTER = "adapter_config.json"
LFS_POINTER, LFS_LIMIT = b"version https://git-lfs.github.com/spec/", 1024  # bytes; its specification has this limit
_GENERATION = "generation_config.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

# Files of weights that transformers' own names do not cover, and what to do about them.
_OTHER_WEIGHTS = MappingProxyType(
    {
        "*.gguf": "name that file itself",
        "consolidated*.safetensors": "these are Mistral's own names; take the files called model*.safetensors",
        "consolidated*.pth": "these are Meta's own names; take the model in transformers' format",
        "*.safetensors": f"rename it to {WEIGHTS} if it holds the whole model",
        "*.bin": "rename it to pytorch_model.bin if it holds the whole model",
        "*.h5": "this is TensorFlow's format; take the model in safetensors",
        "*.msgpack": "this is Flax's format; take the model in safetensors",
        "*.onnx": "this is ONNX; take the model in safetensors",
    }
)


def check_directory(directory: Path) -> None:
    """Checks the small files of a model's directory.

    Raises:
        SmoothQuantError: it is no directory, holds an adapter or pointers of Git LFS in place of files, or has a
            configuration that transformers cannot read.
    """
    for file in directory.iterdir():
        if file.is_file() and file.stat().st_size < LFS_LIMIT and file.read_bytes().startswith(LFS_POINTER):
            raise SmoothQuantError(
                f"{file} is a pointer of Git LFS, not the file itself; run 'git lfs pull' there, or download the model"
            )
    if (directory / ADAPTER).is_file():
        base = read_json(directory / ADAPTER, COPY_AGAIN).get("base_model_name_or_path") or "another model"
        raise SmoothQuantError(
            f"{directory} holds {ADAPTER}, an adapter of PEFT for {base}; merge it into that with "
            "merge_and_unload, save the result and name that"
        )
    config = read_config(directory)
    check_known(config, str(directory))
    dtype = config.get("dtype", config.get("torch_dtype"))
    least = 1 if config.get("quantization_config") else 2  # bytes; quantized models may name the dtype of their weights
    if dtype is not None and not (isinstance(dtype, dict) or _is_float(dtype, least)):
        raise SmoothQuantError(
            f"{directory}: config.json says dtype {dtype!r}, expected float32, float16 or bfloat16; correct it there"
        )
    if (directory / _GENERATION).is_file():
        read_json(directory / _GENERATION, f"{COPY_AGAIN}, or delete the file")


def stored_names(directory: Path) -> Collection[str]:
    """The names of the tensors in a directory; none for pickled ones, which have no headers.

    Raises:
        SmoothQuantError: there are no weights, or files are damaged or missing.
    """
    if any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        headers = read_headers(directory)
        unread = sorted(set(_shards(directory)) - {tensor.file.name for tensor in headers.values()})
        if unread:
            read = INDEX if not (directory / WEIGHTS).is_file() else WEIGHTS
            more = f" and {counted(len(unread) - 1, 'more file')}" if len(unread) > 1 else ""
            warnings.warn(
                f"{directory} holds {unread[0]}{more}, which {read} does not name: not read",
                stacklevel=3,
            )
        return headers
    if any((directory / name).is_file() for name in _PICKLES):
        return ()
    for pattern, advice in _OTHER_WEIGHTS.items():
        for file in sorted(directory.glob(pattern)):
            raise SmoothQuantError(f"{directory} has no {WEIGHTS} or {INDEX}, only {file.name}; {advice}")
    raise SmoothQuantError(f"{directory} has no weights, expected {WEIGHTS} or {INDEX}; {COPY_AGAIN}")


def gguf_names(file: Path) -> list[str]:
    """The names of the tensors in a GGUF file; the caller knows that it can be read."""
    gguf: Any = importlib.import_module("gguf")
    return [str(tensor.name) for tensor in gguf.GGUFReader(file).tensors]


def superfluous_blocks(names: Collection[str], blocks: int) -> list[str]:
    """The tensors of a GGUF file that belong to blocks beyond the number of its header; transformers skips them."""
    return [name for name in names if (match := re.match(r"blk\.(\d+)\.", name)) and int(match[1]) >= blocks]


def check_experts(where: str, names: Collection[str]) -> None:
    """Refuses a mixture in which one expert lacks a tensor that others have: transformers names none then.

    Raises:
        SmoothQuantError: as said.
    """
    numbers: Mapping[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.+)", name)
        if match:
            numbers[match[1]][match[3]].add(int(match[2]))
    lost = [
        f"{path}.{number}.{part}"
        for path, parts in numbers.items()
        for part, present in parts.items()
        for number in sorted(set().union(*parts.values()) - present)
    ]
    if lost:
        raise SmoothQuantError(
            f"{where} lacks {counted(len(lost), 'tensor')} that other experts have: {name_families(lost)}; {COPY_AGAIN}"
        )


def _shards(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("model-*-of-*.safetensors")]


def _is_float(name: object, least: int) -> bool:
    """Whether it names a floating-point dtype of that many bytes; published files say ``torch.float16`` too."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return name == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= least)
