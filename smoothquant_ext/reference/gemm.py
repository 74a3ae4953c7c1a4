"""Oracles of the 8-bit products, alone and as linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .norm_activation import ACTIVATIONS
from .quantize import quantize_with

PANEL = 64
"""Columns in one panel of a packed weight, and what K is padded to."""


def prepack_weight(b: Tensor) -> Tensor:
    """See ``ops.prepack_weight``."""
    n, k = b.shape
    panels, rows4 = -(-n // PANEL), -(-k // PANEL) * PANEL // 4
    padded = torch.zeros(panels * PANEL, rows4 * 4, dtype=torch.int8)
    padded[:n, :k] = b.view(torch.int8)
    packed = torch.zeros(panels, rows4 + 1, PANEL, 4, dtype=torch.int8)
    packed[:, :rows4] = padded.view(panels, PANEL, rows4, 4).transpose(1, 2)
    if b.dtype == torch.int8:
        column_sums = padded.sum(1, dtype=torch.int32).view(panels, PANEL, 1)
        packed[:, rows4] = column_sums.view(torch.int8)
    return packed.view(b.dtype)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """See ``ops.unpack_weight``."""
    panels, rows4 = packed.shape[0], packed.shape[1] - 1
    plain = packed.view(torch.int8)[:, :rows4].transpose(1, 2).reshape(panels * PANEL, rows4 * 4)
    return plain[:out_features, :in_features].contiguous().view(packed.dtype)


def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See ``ops.w8a8_gemm``. Products and sums are fp64: exact for INT8, as K * 127 * 127 < 2^53."""
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
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``ops.w8a8_linear``."""
    q, scale = quantize_with(x, b.dtype, a_scale, smooth)
    return w8a8_gemm(q, b, scale, b_scale, bias, out_dtype or x.dtype)


def w8a8_linears(
    x: Tensor,
    b: Sequence[Tensor],
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """See ``ops.w8a8_linears``."""
    biases = list[Tensor | None](bias) or [None] * len(b)
    return [w8a8_linear(x, *own, a_scale, out_dtype=out_dtype) for own in zip(b, b_scale, biases, strict=True)]


def w8a8_mlp(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    down_a_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """See ``ops.w8a8_mlp``."""
    values = ACTIVATIONS[activation](w8a8_linear(x, gate, gate_scale, gate_bias, a_scale))
    if up is not None:
        assert up_scale is not None
        values = values * w8a8_linear(x, up, up_scale, up_bias, a_scale).float()
    return w8a8_linear(values, down, down_scale, down_bias, down_a_scale, out_dtype=x.dtype)
