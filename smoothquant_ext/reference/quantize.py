"""Oracles of the ops that quantize activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import QMAX

__all__ = [
    "quantize_per_token",
    "quantize_static",
]


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturates and rounds fp32 values to an 8-bit dtype, half to even. NaN becomes 0 in INT8 and stays NaN in fp8."""
    if dtype == torch.int8:
        values = torch.nan_to_num(values, nan=0.0, posinf=QMAX[dtype], neginf=-QMAX[dtype]).round()
    return values.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)


def smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    return x.float() if smooth is None else x.float() / smooth.reshape(-1)


def rotated(values: Tensor, block: int) -> Tensor:
    """fp32 [..., K], each block of values rotated, see ``ops.quantize_per_token``; as it is for 0."""
    if block == 0:
        return values
    shape, half = values.shape, 1
    while half < block:
        first, second = values.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half).unbind(-2)
        values = torch.stack((first + second, first - second), dim=-2)
        half *= 2
    return values.reshape(shape) * torch.tensor(block**-0.5, dtype=torch.float32)


def quantize_per_token(
    x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.quantize_per_token``."""
    values = rotated(smoothed(x, smooth), rotate)
    absmax = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(*x.shape[:-1], 1)
    finite = values.isfinite().all(-1, keepdim=True)
    qmax = torch.tensor(QMAX[dtype], dtype=torch.float32)
    scale = torch.where(absmax == 0, 1.0, absmax / qmax)
    # qmax / absmax overflows for subnormal rows; the largest float keeps their zeros from becoming 0 * inf.
    multiplier = (qmax / absmax).clamp(max=torch.finfo(torch.float32).max)
    q = cast(torch.where(finite & (absmax != 0), values * multiplier, 0.0), dtype)
    return q, torch.where(finite, scale, torch.nan).squeeze(-1)


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype, rotate: int = 0) -> Tensor:
    """See ``ops.quantize_static``."""
    return cast(rotated(x.float(), rotate) * (1.0 / scale.reshape(())), dtype)


def quantize_with(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None, smooth: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """q and the scale of each row, which is NaN where a value is not finite; with a static scale or one per token."""
    if scale is None:
        return quantize_per_token(x, dtype, smooth, rotate)
    values = rotated(smoothed(x, smooth), rotate)
    finite = values.isfinite().all(-1)
    q = quantize_static(torch.where(finite.unsqueeze(-1), values, 0.0), scale, dtype)
    return q, torch.where(finite, scale.reshape(()), torch.nan)
