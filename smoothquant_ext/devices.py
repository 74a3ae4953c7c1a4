"""The device that a user names."""

from __future__ import annotations

import re

import torch

from .errors import SmoothQuantError

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
