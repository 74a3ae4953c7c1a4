"""``w8a8_experts`` made of other ops: its oracle, and what computes it where it has no kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .norm_activation import ACTIVATIONS


def experts_one_by_one(
    kernels: Any,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """``w8a8_experts`` made of the ops of ``kernels``: ``reference`` for the oracle, ``ops`` where there is no kernel.

    The experts that a token chose are looked up on the host, so this cannot be captured in a graph.
    """
    experts = gate.shape[0]
    tokens = x.shape[:-1].numel()
    rows, index = x.reshape(tokens, x.shape[-1]), top_k_index.reshape(tokens, top_k_index.shape[-1])
    n = down.shape[1] if down.dim() == 3 else down_scale.numel() // experts
    layers = [
        (weight, weight_scale.reshape(experts, -1), None if bias is None else bias.reshape(experts, -1))
        for weight, weight_scale, bias in ((gate, gate_scale, gate_bias), (down, down_scale, down_bias))
    ]
    if up is not None and up_scale is not None:
        layers.append((up, up_scale.reshape(experts, -1), None if up_bias is None else up_bias.reshape(experts, -1)))

    q, scale = kernels.quantize_per_token(rows, gate.dtype)
    slots = rows.new_zeros((*index.shape, n), dtype=torch.float32)
    for expert in index.unique().tolist():
        if expert == experts:
            continue
        token, slot = (index == expert).nonzero(as_tuple=True)
        own = [(w[expert], s[expert], None if b is None else b[expert]) for w, s, b in layers]
        first, *second = (kernels.w8a8_gemm(q[token], w, scale[token], s, b, x.dtype) for w, s, b in (own[0], *own[2:]))
        values = ACTIVATIONS[activation](first)
        hidden, hidden_scale = kernels.quantize_per_token(values * second[0].float() if second else values, down.dtype)
        weight, weight_scale, bias = own[1]
        slots[token, slot] = kernels.w8a8_gemm(hidden, weight, hidden_scale, weight_scale, bias, torch.float32)
    weights = top_k_weights.reshape(index.shape).float()
    total = slots.new_zeros(rows.shape[0], n)
    for i in range(index.shape[1]):
        chosen = (index[:, i] < experts)[:, None]
        total = torch.where(chosen, total + weights[:, i : i + 1] * slots[:, i], total)
    return total.to(x.dtype).reshape(*x.shape[:-1], n)
