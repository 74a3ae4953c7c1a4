"""Loads the compiled libraries of the package."""

from __future__ import annotations

from pathlib import Path

import torch

CPU = Path(__file__).parents[1] / "_C.so"
CUDA = Path(__file__).parents[1] / "_C_cuda.so"


def load(path: Path) -> None:
    """Loads a compiled library, which registers its ops.

    Raises:
        ImportError: it is missing, or cannot be loaded, with the dynamic linker's reason.
    """
    if not path.is_file():
        raise ImportError(
            f"smoothquant_ext is not compiled: {path.name} is missing; run 'pip install .' in its source folder"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own message names the file only; the linker's is the cause.
        reason = repr(error.__cause__) if error.__cause__ is not None else str(error)
        raise ImportError(f"smoothquant_ext cannot load {path.name}: {reason}") from error
