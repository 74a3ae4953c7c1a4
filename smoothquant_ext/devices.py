"""The device that a user names, how models are loaded to it, and what to do when its memory is full."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers.utils import is_accelerate_available

from .errors import SmoothQuantError

Loaded = TypeVar("Loaded")

AUTO = "auto"


def named_device(name: torch.device | str) -> torch.device:
    """The device of a name: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``: a GPU if torch sees one, else the CPU.

    Raises:
        SmoothQuantError: the name is another one, or torch does not see that GPU.
    """
    name = str(name)
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise SmoothQuantError(f"the device is {name!r}, expected auto, cpu, cuda or a GPU's number as in cuda:1")
    device = torch.device(name)
    if device.type == "cuda":
        if torch.version.cuda is None:
            raise SmoothQuantError(f"the device is {name}, but this torch is built without CUDA: use cpu")
        if not torch.cuda.is_available():
            raise SmoothQuantError(f"the device is {name}, but torch finds no GPU here: use cpu, or check nvidia-smi")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            last = f"cuda:{count - 1}"
            raise SmoothQuantError(f"the device is {name}, but the last of the GPUs here is {last}: use that or cuda:0")
    return device


@contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Turns a GPU's out-of-memory error into a ``SmoothQuantError`` that ends with what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise SmoothQuantError(
            f"the GPU's memory is full ({free / 1e9:.1f} of {total / 1e9:.1f} GB were free after the failure): {remedy}"
        ) from error


def loaded_on(device: torch.device | str | None, load: Callable[[Mapping[str, Any]], Loaded]) -> Loaded:
    """Loads a model of transformers straight to a device; one too large for a GPU is spread over main memory too.

    Only accelerate can do either. Without it the model is loaded on the CPU, for the caller to move.

    Args:
        device: a device, or ``None`` for the CPU.
        load: calls ``from_pretrained`` with these arguments besides its own.
    """
    if device is None or torch.device(device).type != "cuda" or not is_accelerate_available():
        return load({})
    try:
        return load({"device_map": {"": torch.device(device)}})
    except torch.OutOfMemoryError:
        warnings.warn(
            f"the model is larger than the free memory of {device}: a part stays in main memory and runs slowly",
            stacklevel=2,
        )
    return load({"device_map": AUTO})


def move_(model: torch.nn.Module, device: torch.device | str | None) -> None:
    """Moves a loaded model to a device, unless accelerate has brought it there.

    Raises:
        SmoothQuantError: it is too large, and accelerate is not installed.
    """
    if device is not None and not getattr(model, "hf_device_map", None):
        with memory_explained("pip install accelerate, which spreads a model over GPU and main memory, or use cpu"):
            model.to(device)
