"""The attention of ``w8a8_decoder_layer_`` on a GPU: torch's, called as the op calls it, in plain Python."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def torch_attention(  # noqa: PLR0913
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
    """See ``ops.attention``; and csrc/cuda/compute/decoder_attention.h for the shapes, which decide about bits."""
    (batch, heads, time, d), (kv_heads, length) = q.shape, k.shape[1:3]
    sharing = heads // kv_heads
    if k_scale is not None and v_scale is not None:
        k, v = ((x.float() * own.unsqueeze(-1)).to(q.dtype) for x, own in ((k, k_scale), (v, v_scale)))
    if mask is None and not (causal and 1 < time < length):
        y = scaled_dot_product_attention(q, k, v, is_causal=causal and time > 1, scale=scale, enable_gqa=sharing > 1)
        return y.transpose(1, 2).contiguous()
    visible = torch.ones(1, 1, time, length, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(length - time)
    if mask is not None:
        visible = visible & mask
    if time == 1 and sharing > 1:
        q = q.reshape(batch * kv_heads, 1, sharing, d)
        k, v = k.flatten(0, 1).unsqueeze(1), v.flatten(0, 1).unsqueeze(1)
        own = (1, sharing) if visible.shape[:2] == (1, 1) else (batch, heads)
        visible = visible.expand(*own, 1, length).reshape(-1, 1, sharing, length)
    else:
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    additive = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
    y = scaled_dot_product_attention(q, k, v, additive, scale=scale)
    return y.reshape(batch, time, heads, d) if time == 1 else y.transpose(1, 2).contiguous()
