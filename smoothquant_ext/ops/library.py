"""The compiled libraries of the package: loads them, and says why one is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

CPU = Path(__file__).parents[1] / "_C.so"
CUDA = Path(__file__).parents[1] / "_C_cuda.so"
BUILT = Path(__file__).parents[1] / "_build.json"
"""What setup.py says of the build."""


class Built(NamedTuple):
    """The CUDA library as it was built."""

    archs: str
    """The architectures that it has code for, such as "80+PTX 90a"; empty if nothing is known of it."""
    nvcc: str
    """The version of the nvcc that compiled it, such as "13.0", or empty."""
    why_missing: str
    """Why there is none, or nothing."""


def built() -> Built:
    """What is known of the CUDA library before it is loaded."""
    try:
        record = json.loads(BUILT.read_text())
        archs, nvcc, sentence = (str(record[name]) for name in ("archs", "nvcc", "sentence"))
    except (OSError, ValueError, KeyError, TypeError):
        archs, nvcc, sentence = "", "", _not_compiled(CUDA)
    return Built(archs, nvcc, "") if CUDA.is_file() else Built("", "", sentence)


def _not_compiled(path: Path) -> str:
    return f"smoothquant_ext is not compiled: {path.name} is missing; run 'pip install .' in its source folder"


def load(path: Path) -> None:
    """Loads a compiled library, which registers its ops.

    Raises:
        ImportError: it is missing, or cannot be loaded, with the dynamic linker's reason.
    """
    if not path.is_file():
        raise ImportError(_not_compiled(path))
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own message names the file only; the linker's is the cause.
        reason = repr(error.__cause__) if error.__cause__ is not None else str(error)
        raise ImportError(f"smoothquant_ext cannot load {path.name}: {reason}") from error
