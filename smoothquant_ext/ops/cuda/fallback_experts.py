"""The experts of a mixture made of other ops: where their own kernels are not proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..gemm import w8a8_gemm
from ..norm_activation import gelu_mul_quantize, silu_mul_quantize
from ..quantize import quantize_per_token
from .fallback_checks import check


def w8a8_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """See ``ops.w8a8_experts``. Made of other ops, which may be kernels; waits for the device, once."""
    check("experts", x, top_k_index, top_k_weights, weight, weight_scale, bias, activation, rotate)
    return experts_one_by_one(x, top_k_index, top_k_weights, weight, weight_scale, bias, activation, rotate)


def experts_one_by_one(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """``w8a8_experts`` of arguments that are checked already, expert by expert, with the same bits.

    An expert that nobody chose costs nothing. Which they are is looked up on the host, once a call, so that this cannot
    be captured in a graph.

    Raises:
        RuntimeError: for an index beyond E.
    """
    experts, down, down_scale = weight[0].shape[0], weight[-1], weight_scale[-1]
    n = down.shape[1] if down.dim() == 3 else down_scale.numel() // experts
    slots = top_k_index.shape[-1]
    rows, index = x.unsqueeze(0).flatten(0, -2), top_k_index.unsqueeze(0).flatten(0, -2)
    scales = [each.reshape(experts, -1) for each in weight_scale]
    biases = [None if each is None else each.reshape(experts, -1) for each in bias or [None] * len(weight)]
    order, ends = _by_expert(index.flatten(), experts)
    x_rotate, down_rotate = rotate or (0, 0)
    q, q_scale = quantize_per_token(rows, weight[0].dtype, rotate=x_rotate)
    token = order // max(1, slots)
    q, q_scale = q.view(torch.int8)[token].view(q.dtype), q_scale[token]
    outputs = rows.new_zeros((order.numel(), n), dtype=torch.float32)
    for expert, (begin, end) in enumerate(pairwise(ends)):
        if begin == end:
            continue
        *first, last = (
            (weight[i][expert], scales[i][expert], None if (b := biases[i]) is None else b[expert])
            for i in range(len(weight))
        )
        own, own_scale = q[begin:end], q_scale[begin:end]
        inner = [w8a8_gemm(own, w, own_scale, scale, b, x.dtype) for w, scale, b in first]
        gate, up = inner if len(inner) == 2 else (inner[0], torch.ones_like(inner[0]))
        hidden, hidden_scale = _GATED[activation](gate, up, last[0].dtype, rotate=down_rotate)
        outputs[order[begin:end]] = w8a8_gemm(hidden, last[0], hidden_scale, *last[1:], torch.float32)
    shares = top_k_weights.reshape(index.shape).float()
    total = outputs.new_zeros(len(rows), n)
    for i, output in enumerate(outputs.unflatten(0, index.shape).unbind(1)):
        is_chosen = (index[:, i] < experts)[:, None]
        total = torch.where(is_chosen, total + shares[:, i : i + 1] * output, total)
    return total.to(x.dtype).reshape(*x.shape[:-1], n)


def _by_expert(index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Slots in the order of their experts, and where those of expert e begin and end: elements e and e + 1."""
    if not len(index):
        return index, [0] * (experts + 1)
    chosen, order = index.sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(experts + 1, device=index.device))
    first, last, *there = torch.cat([chosen[:1], chosen[-1:], ends]).tolist()
    for wrong in (first, last):
        if not 0 <= wrong <= experts:
            raise RuntimeError(
                f"w8a8_experts: top_k_index has {wrong}, expected 0 to {experts - 1}, or E={experts} for no expert"
            )
    return order, there


def _relu_mul_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype, rotate: int) -> tuple[Tensor, Tensor]:
    """There is no such kernel, and no rounding that one would save."""
    return quantize_per_token(torch.where(gate < 0, 0.0, gate.float()) * up.float(), dtype, rotate=rotate)


_GATED: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "silu": silu_mul_quantize,
    "gelu": gelu_mul_quantize,
    "gelu_tanh": partial(gelu_mul_quantize, approximate="tanh"),
    "relu": _relu_mul_quantize,
}
