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


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that are free, those included that torch has taken from the driver and holds ready."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + idle)


@contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Turns a GPU's out-of-memory error into a ``SmoothQuantError`` that ends with what to do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
        amount = "" if wanted is None else f" for another {wanted[0].removeprefix('Tried to allocate ')}"
        raise SmoothQuantError(f"the GPU's memory is too small{amount}: {remedy}") from error


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of fp32 are computed in fp32 until the ``with`` body ends, not in TF32, whatever the program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def move_(model: Any, device: torch.device | str | None) -> bool:
    """Moves a model of transformers that was loaded to a device there; whether it was elsewhere.

    Raises:
        SmoothQuantError: it is too large, and accelerate is not installed.
    """
    is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if device is None or is_spread or model.device.type == torch.device(device).type:
        return False
    with memory_explained("pip install accelerate, which spreads a model over GPU and main memory, or use cpu"):
        model.to(device)
    return True
