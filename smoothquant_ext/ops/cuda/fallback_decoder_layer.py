"""A decoder layer made of other ops: where its own kernel is not proven."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..floating import attention, rms_norm
from ..gemm import w8a8_linear, w8a8_linear_group, w8a8_mlp
from ..quantize import quantize_per_token
from .fallback_checks import check


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads [B, H, T, D] by angles [1 or B, T, D]; rounds after every step."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


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
    """See ``ops.w8a8_decoder_layer_``. The other ops may be kernels.

    A position outside of the room stops the device.
    """
    caches = (keys, values, past, mask, scale, causal, activation, keys_scale, values_scale)
    layers = (weight, weight_scale, bias, input_scale)
    check("decoder_layer", x, norm, post_norm, *layers, cos, sin, *caches, q_norm, k_norm, positions, rotate)
    biases = list(bias or [None] * 7)
    x_scale, o_scale, mlp_scale, down_scale = input_scale or [None] * 4
    x_rotate, o_rotate, *mlp_rotate = rotate or [0] * 4
    normed = rms_norm(x, norm, eps, offset)
    q, k, v = (
        each.unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        for each in w8a8_linear_group(normed, weight[:3], weight_scale[:3], biases[:3], x_scale, rotate=x_rotate)
    )
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, head_eps, offset), rms_norm(k, k_norm, head_eps, offset)
    k = rotary(k, cos, sin)
    total, at = past + x.shape[1], torch.arange(past, past + x.shape[1], device=x.device)
    if positions is not None:
        total, at = keys.shape[2], positions
        if causal:
            seen = (torch.arange(total, device=x.device) <= positions[:, None])[None, None]
            mask, causal = seen if mask is None else mask & seen, False
    if keys_scale is not None and values_scale is not None:
        k, own = quantize_per_token(k, torch.int8)
        keys_scale.index_copy_(2, at, own)
        v, own = quantize_per_token(v, torch.int8)
        values_scale.index_copy_(2, at, own)
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    k, v = keys[:, :, :total], values[:, :, :total]
    k_scale, v_scale = (None if each is None else each[:, :, :total] for each in (keys_scale, values_scale))
    attended = attention(rotary(q, cos, sin), k, v, mask, scale=scale, causal=causal, k_scale=k_scale, v_scale=v_scale)
    h = x + w8a8_linear(attended.flatten(2), weight[3], weight_scale[3], biases[3], o_scale, rotate=o_rotate)
    mlp = weight[4:], weight_scale[4:], biases[4:], [mlp_scale, down_scale]
    return h + w8a8_mlp(rms_norm(h, post_norm, post_eps, offset), *mlp, activation, mlp_rotate)
