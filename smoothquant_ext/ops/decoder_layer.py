"""Whole decoder layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .declare import op

__all__ = ["w8a8_decoder_layer_"]


@op("gemm", cuda=("quantize", "norm_activation", "gemm", "decoder_layer"))
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
    """A decoder layer of the Llama family: ``h = x + o(attention(q, k, v))``, ``y = h + mlp(rms_norm(h))``.

    q, k and v are the layers of ``rms_norm(x)``; q and k are normalized, head by head, if there are weights for that
    (Henry et al. 2020), and rotated by ``cos`` and ``sin`` (Su et al. 2021, the halves of a head being the two
    coordinates). It has the bits of ``rms_norm``, ``w8a8_linear_group``, torch's rotation, ``attention``,
    ``w8a8_linear``, torch's addition and ``w8a8_mlp`` one after the other; with an INT8 cache, also of
    ``quantize_per_token`` of the new keys, once rotated, and values. On a GPU torch's scaled dot-product attention
    takes the place of ``attention``, on keys and values dequantized to the dtype of ``x``.

    ``past`` is a number of the host, which a captured CUDA graph repeats. With ``positions`` in its place, the new
    tokens go where a tensor says, nobody waits for its values, and the whole room of the cache is attended to.

    Args:
        x: fp32, bf16 or fp16 [B, T, K].
        norm: fp32, bf16 or fp16 [K], the weight of the first norm.
        post_norm: the same of the second one.
        eps: of the first norm.
        post_eps: of the second one.
        offset: added to the weights of both norms.
        weight: (q, k, v, o, gate, up, down), 8 bits of one dtype, plain or packed.
        weight_scale: one for each weight, as ``w8a8_linear`` takes it.
        bias: one for each weight, or ``None`` where a layer has none; ``None`` or an empty list if no layer has one.
        input_scale: static scales of the inputs of (q, k, v), of o, of (gate, up) and of down, ``None`` for a scale per
            token; ``None`` or an empty list for scales per token everywhere.
        cos: of the dtype of ``x`` [1 or B, T, D].
        sin: the same.
        keys: of the dtype of ``x``, or int8, [B, Hkv, room, D], contiguous; gets T more tokens behind ``past`` or at
            ``positions``.
        values: the same dtype and, but for the room, shape.
        past: tokens that are in ``keys`` and ``values``; ignored where there are ``positions``.
        mask: bool [1 or B, 1 or H, T, past + T], with ``positions`` [1 or B, 1 or H, T, room], true where a query may
            see a key; or ``None``.
        scale: of the attention, usually ``D ** -0.5``.
        causal: whether query i sees only keys up to past + i, or up to positions[i].
        activation: of the MLP, see ``w8a8_mlp``.
        keys_scale: fp32 [B, Hkv, room], contiguous, of int8 ``keys``; gets T more as well. ``None`` for others.
        values_scale: the same for ``values``.
        q_norm: fp32, bf16 or fp16 [D], the weight of an RMS norm of every head of q; ``None`` without norms.
        k_norm: the same of the keys.
        head_eps: of both.
        positions: int64 [T], no two the same, where the new tokens go; needs ``causal`` or a ``mask``, and the same
            room for keys and values. On the CPU each is the one before plus 1. On a GPU, where nobody looks at them in
            time, a token outside of the room is not stored, and its row of y is NaN. ``None``: behind ``past``.
        rotate: of what q, o, gate and down read, each as in ``w8a8_linear``; an empty list for none.

    Returns:
        y, of the dtype of ``x`` [B, T, K].

    Raises:
        RuntimeError: for dtypes, shapes, devices or numbers of tensors that do not fit.
    """
    return torch.empty_like(x, memory_format=torch.contiguous_format)
