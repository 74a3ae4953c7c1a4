"""What the fake kernels share.

A fake kernel says what an op returns without computing it, for ``torch.compile`` and meta tensors: shapes and dtypes
alone. Symbolic sizes stay symbolic: no fake kernel turns one into a number.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_devices(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    """Raises ``RuntimeError`` for a tensor that is on another device than ``x``, which the op calls ``first``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, but {first} is on {x.device}")


def out_features(b: Tensor, b_scale: Tensor) -> int:
    """N of a weight, plain or packed."""
    return b.shape[0] if b.dim() == 2 else b_scale.numel()


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q and the scales of the rows of ``x``."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
