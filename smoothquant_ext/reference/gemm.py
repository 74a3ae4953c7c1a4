"""Oracles of the 8-bit products, alone and as linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import PANEL, packed_shape, unpack_weight
from .norm_activation import ACTIVATIONS
from .quantize import quantize_with

__all__ = [
    "prepack_weight",
    "w8a8_gemm",
    "w8a8_linear",
    "w8a8_linear_group",
    "w8a8_mlp",
]


def prepack_weight(weight: Tensor) -> Tensor:
    """See ``ops.prepack_weight``."""
    if weight.dim() == 3:
        return torch.stack([prepack_weight(each).view(torch.int8) for each in weight]).view(weight.dtype)
    n, k = weight.shape
    packed = torch.zeros(packed_shape(n, k), dtype=torch.int8)
    panels, rows4 = packed.shape[0], packed.shape[1] - 1
    padded = torch.zeros(panels * PANEL, rows4 * 4, dtype=torch.int8)
    padded[:n, :k] = weight.view(torch.int8)
    packed[:, :rows4] = padded.view(panels, PANEL, rows4, 4).transpose(1, 2)
    if weight.dtype == torch.int8:
        column_sums = padded.sum(1, dtype=torch.int32).view(panels, PANEL, 1)
        packed[:, rows4] = column_sums.view(torch.int8)
    return packed.view(weight.dtype)


def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See ``ops.w8a8_gemm``. Products and sums are fp64: exact for INT8, as K * 128 * 128 < 2^53."""
    if b.dim() == 4:
        b = unpack_weight(b, b_scale.numel(), a.shape[-1])
    a_scale = a_scale.reshape(()) if a_scale.numel() == 1 else a_scale.reshape(*a.shape[:-1], 1)
    b_scale = b_scale.reshape(()) if b_scale.numel() == 1 else b_scale.reshape(-1)
    sums = a.float().double() @ b.float().double().T
    if a.dtype == torch.int8:
        sums = sums.long()  # an integer has no -0
    y = sums.float() * (a_scale * b_scale)
    if bias is not None:
        y = y + bias.float().reshape(-1)
    return y.to(out_dtype)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> Tensor:
    """See ``ops.w8a8_linear``."""
    q, scale = quantize_with(x, weight.dtype, input_scale, smooth, rotate)
    return w8a8_gemm(q, weight, scale, weight_scale, bias, out_dtype or x.dtype)


def w8a8_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> list[Tensor]:
    """See ``ops.w8a8_linear_group``."""
    layers = zip(weight, weight_scale, bias or [None] * len(weight), strict=True)
    return [w8a8_linear(x, *layer, input_scale, out_dtype=out_dtype, rotate=rotate) for layer in layers]


def w8a8_mlp(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """See ``ops.w8a8_mlp``."""
    layers = list(zip(weight, weight_scale, bias or [None] * len(weight), strict=True))
    return mlp(x, layers, input_scale or (None, None), activation, x.dtype, rotate)


def mlp(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    input_scale: Sequence[Tensor | None],
    activation: str,
    out_dtype: torch.dtype,
    rotate: Sequence[int],
) -> Tensor:
    """``w8a8_mlp`` with a result of any dtype."""
    *first, down = layers
    x_scale, down_scale = input_scale
    x_rotate, down_rotate = rotate or (0, 0)
    gate, *up = (w8a8_linear(x, *layer, x_scale, rotate=x_rotate) for layer in first)
    values = ACTIVATIONS[activation](gate)
    for factor in up:
        values = values * factor.float()
    return w8a8_linear(values, *down, down_scale, out_dtype=out_dtype, rotate=down_rotate)
