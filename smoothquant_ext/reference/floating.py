"""Oracles of the ops that stay in floating point between the products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "attention",
    "linear",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``ops.linear``. Computed in fp64, rounded once."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double().reshape(-1)).to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See ``ops.attention``. Computed in fp64, on dequantized keys and values; rounded once."""
    group = q.shape[1] // max(1, k.shape[1])
    k, v = (
        (x.double() if own is None else x.double() * own.double().unsqueeze(-1)).repeat_interleave(group, 1)
        for x, own in ((k, k_scale), (v, v_scale))
    )
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    visible = visible.expand(q.shape[0], q.shape[1], -1, -1)
    if mask is not None:
        visible = visible & mask
    scores = (scale * q.double() @ k.transpose(2, 3)).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (p @ v).transpose(1, 2).contiguous().to(q.dtype)
