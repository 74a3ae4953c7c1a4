"""``w8a8_decoder_layer_`` in plain torch: the oracles of ``reference`` one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .floating import attention
from .gemm import w8a8_linear, w8a8_mlp
from .norm_activation import rms_norm
from .quantize import quantize_per_token


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
    b: Sequence[Tensor],
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    a_scale: Sequence[Tensor],
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
    attend: Callable[..., Tensor] = attention,
) -> Tensor:
    """See ``ops.w8a8_decoder_layer_``; ``attend`` computes the attention."""
    biases = [own if own.numel() else None for own in bias] or [None] * 7
    static = [scale if scale.numel() else None for scale in a_scale] or [None] * 4
    q, k, v = (
        w8a8_linear(rms_norm(x, norm, eps, offset), b[i], b_scale[i], biases[i], static[0])
        .unflatten(-1, (-1, cos.shape[-1]))
        .transpose(1, 2)
        for i in range(3)
    )
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, head_eps, offset), rms_norm(k, k_norm, head_eps, offset)
    total = past + x.shape[1]
    k, scales = rotate(k, cos, sin), list[Tensor]()
    if keys_scale is not None and values_scale is not None:
        k, keys_scale[:, :, past:total] = quantize_per_token(k, torch.int8)
        v, values_scale[:, :, past:total] = quantize_per_token(v, torch.int8)
        scales = [keys_scale[:, :, :total], values_scale[:, :, :total]]
    keys[:, :, past:total], values[:, :, past:total] = k, v
    attended = attend(rotate(q, cos, sin), keys[:, :, :total], values[:, :, :total], mask, scale, causal, *scales)
    h = x + w8a8_linear(attended.flatten(2), b[3], b_scale[3], biases[3], static[1])
    _, _, _, _, gate, up, down = zip(b, b_scale, biases, strict=True)
    operands = *gate[:2], *down[:2], *up[:2], gate[2], up[2], down[2]
    return h + w8a8_mlp(rms_norm(h, post_norm, post_eps, offset), *operands, static[2], static[3], activation)
