"""``w8a8_decoder_layer_`` in plain torch: the oracles of ``reference`` one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .floating import attention
from .gemm import w8a8_linear, w8a8_mlp
from .norm_activation import rms_norm
from .quantize import quantize_per_token

__all__ = ["w8a8_decoder_layer_"]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads [B, H, T, D] by angles [1 or B, T, D], every step rounded to the dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def w8a8_decoder_layer_(
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor,
    eps: float,
    post_eps: float,
    offset: float,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None,
    input_scale: Sequence[Tensor | None] | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    activation: str = "silu",
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    head_eps: float = 0.0,
    positions: Tensor | None = None,
    rotate: Sequence[int] = (),
) -> Tensor:
    """See ``ops.w8a8_decoder_layer_``."""
    biases = bias or [None] * 7
    x_scale, o_scale, mlp_scale, down_scale = input_scale or [None] * 4
    x_rotate, o_rotate, *mlp_rotate = rotate or [0] * 4
    *qkv, o = list(zip(weight, weight_scale, biases, strict=True))[:4]
    normed = rms_norm(x, norm, eps, offset)
    q, k, v = (
        w8a8_linear(normed, *layer, x_scale, rotate=x_rotate).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        for layer in qkv
    )
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, head_eps, offset), rms_norm(k, k_norm, head_eps, offset)
    k = rotary(k, cos, sin)
    total, at = past + x.shape[1], torch.arange(past, past + x.shape[1], device=x.device)
    if positions is not None:
        total, at = keys.shape[2], positions
        if causal:
            seen = torch.arange(total, device=x.device) <= positions[:, None]
            mask, causal = seen[None, None] if mask is None else mask & seen, False
    cache_scales: dict[str, Tensor] = {}
    if keys_scale is not None and values_scale is not None:
        k, keys_scale[:, :, at] = quantize_per_token(k, torch.int8)
        v, values_scale[:, :, at] = quantize_per_token(v, torch.int8)
        cache_scales = {"k_scale": keys_scale[:, :, :total], "v_scale": values_scale[:, :, :total]}
    keys[:, :, at], values[:, :, at] = k, v
    visible = keys[:, :, :total], values[:, :, :total]
    attended = attention(rotary(q, cos, sin), *visible, mask, scale=scale, causal=causal, **cache_scales)
    h = x + w8a8_linear(attended.flatten(2), *o, o_scale, rotate=o_rotate)
    mlp = weight[4:], weight_scale[4:], biases[4:], [mlp_scale, down_scale]
    return h + w8a8_mlp(rms_norm(h, post_norm, post_eps, offset), *mlp, activation, mlp_rotate)
