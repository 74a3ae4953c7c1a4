"""What stays in floating point between the products, on a GPU through torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .fallback_checks import check


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``ops.linear``."""
    check("linear", x, weight, bias)
    return F.linear(x.contiguous(), weight, None if bias is None else bias.reshape(-1))


def _dequantized(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """INT8 keys or values with their scales, rounded to ``dtype``; others as they are."""
    return x if scale is None else (x.float() * scale.unsqueeze(-1)).to(dtype)


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """bool [1 or B, 1 or H, T, S], which key a query may see; ``None`` where torch can do without: all, or the causal
    mask of as many queries as keys, the only one that torch has."""
    queries, keys = q.shape[2], k.shape[2]
    if not causal or (mask is None and queries in (1, keys) and keys > 0):
        return mask
    past = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return past[None, None] if mask is None else mask & past


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
    """See ``ops.attention``.

    INT8 keys and values are rounded to the dtype of ``q`` once they are dequantized.
    """
    check("attention", q, k, v, mask, scale, k_scale, v_scale)
    (batch, heads, queries, _), (_, kv_heads, keys, width) = q.shape, v.shape
    if q.numel() == 0 or v.numel() == 0:
        return q.new_zeros((batch, queries, heads, width))
    k, v = _dequantized(k, k_scale, q.dtype), _dequantized(v, v_scale, q.dtype)
    visible = _visible(q, k, mask, causal)
    if visible is None:
        is_causal = is_grouped = False  # torch wants numbers that are known, which symbolic sizes become in a branch
        if causal and queries > 1:
            is_causal = True
        if heads != kv_heads:
            is_grouped = True
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)
        return y.transpose(1, 2).contiguous()
    # With a mask, torch would repeat keys and values for every head that reads them. Here the heads of a group are
    # queries of one head instead.
    group = heads // kv_heads
    in_groups = q.reshape(batch, kv_heads, group * queries, -1)
    if visible.shape[1] == 1:
        own = visible.repeat(1, 1, group, 1)
    else:
        own = visible.reshape(-1, kv_heads, group * queries, keys)
    y = F.scaled_dot_product_attention(in_groups, k, v, attn_mask=own, scale=scale)
    y = y.reshape(batch, heads, queries, width).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return y.transpose(1, 2).contiguous()
