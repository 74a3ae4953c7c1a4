"""``w8a8_experts`` made of single ops, expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from smoothquant_ext import ops


def experts_one_by_one(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
) -> Tensor:
    """As ``w8a8_experts``."""
    experts, down, down_scale = weight[0].shape[0], weight[-1], weight_scale[-1]
    n = down.shape[1] if down.dim() == 3 else down_scale.numel() // experts
    rows, index = x.reshape(-1, x.shape[-1]), top_k_index.reshape(-1, top_k_index.shape[-1])
    scales = [each.reshape(experts, -1) for each in weight_scale]
    biases = [None if each is None else each.reshape(experts, -1) for each in bias or [None] * len(weight)]
    q, q_scale = ops.quantize_per_token(rows, weight[0].dtype)
    outputs = rows.new_zeros((*index.shape, n), dtype=torch.float32)
    for expert in index.unique().tolist():
        if expert == experts:
            continue
        token, slot = (index == expert).nonzero(as_tuple=True)
        *first, last = (
            (weight[i][expert], scales[i][expert], None if (b := biases[i]) is None else b[expert])
            for i in range(len(weight))
        )
        inner = [ops.w8a8_gemm(q[token], w, q_scale[token], scale, b, x.dtype) for w, scale, b in first]
        gate, up = inner if len(inner) == 2 else (inner[0], torch.ones_like(inner[0]))
        hidden, hidden_scale = _GATED[activation](gate, up, last[0].dtype)
        outputs[token, slot] = ops.w8a8_gemm(hidden, last[0], hidden_scale, *last[1:], torch.float32)
    shares = top_k_weights.reshape(index.shape).float()
    total = outputs.new_zeros(len(rows), n)
    for i in range(index.shape[1]):
        is_chosen = (index[:, i] < experts)[:, None]
        total = torch.where(is_chosen, total + shares[:, i : i + 1] * outputs[:, i], total)
    return total.to(x.dtype).reshape(*x.shape[:-1], n)


def _relu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """There is no such kernel, and no rounding that one would save."""
    return ops.quantize_per_token(torch.where(gate < 0, 0.0, gate.float()) * up.float(), dtype)


_GATED: Mapping[str, Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]] = {
    "silu": ops.silu_mul_quantize,
    "gelu": ops.gelu_mul_quantize,
    "gelu_tanh": partial(ops.gelu_mul_quantize, approximate="tanh"),
    "relu": _relu_mul_quantize,
}
