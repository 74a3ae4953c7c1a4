"""The experts of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from .fakes import check_devices

_w8a8_experts = torch.ops.sq.w8a8_experts.default


def w8a8_experts(
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
    """The experts of a mixture of 8-bit MLPs: ``y = sum over slots s of top_k_weights[s] * mlp_e(x)``.

    e is ``top_k_index[s]``. Each token is quantized once, with a scale of its own, for all its experts. An expert
    computes what ``w8a8_mlp`` does, ``down(act(gate(x)) * up(x))``, but its output stays fp32; the sum is taken in
    fp32, slot by slot, and rounded once. So a token's bits depend neither on the other tokens nor on the number of
    threads. On the CPU only; the same made of other ops, which runs anywhere, is
    ``reference_experts.experts_one_by_one``.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        top_k_index: int64 [..., slots]: the expert of each slot of a token, or E for none.
        top_k_weights: fp32, bf16 or fp16, of the same shape.
        gate: the weights [E, I, K] of E experts, 8 bits, plain or packed (see ``prepack_weight``).
        gate_scale: fp32, E * I elements, or E when ``gate`` is plain.
        down: the weights [E, N, I].
        down_scale: fp32, E * N elements, or E when ``down`` is plain.
        up: the weights [E, I, K], of the dtype of ``gate``; ``None`` for experts that compute ``down(act(gate(x)))``.
        up_scale: its scales.
        gate_bias: fp32, bf16 or fp16 [E, I], or ``None``.
        up_bias: the same.
        down_bias: fp32, bf16 or fp16 [E, N], or ``None``.
        activation: as in ``w8a8_mlp``.

    Returns:
        y, of the dtype of ``x`` [..., N]; 0 for a token without an expert.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, an index beyond E, or another activation.
    """
    y: Tensor = _w8a8_experts(
        x,
        top_k_index,
        top_k_weights,
        gate,
        gate_scale,
        down,
        down_scale,
        up,
        up_scale,
        gate_bias,
        up_bias,
        down_bias,
        activation,
    )
    return y


@torch.library.register_fake("sq::w8a8_experts")
def _(
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
    chosen = {"top_k_index": top_k_index, "top_k_weights": top_k_weights}
    check_devices("w8a8_experts", "x", x, **chosen, gate=gate, down=down, up=up)
    n = down.shape[1] if down.dim() == 3 else down_scale.numel() // down.shape[0]
    return x.new_empty((*x.shape[:-1], n))
