"""Ops that stay in floating point, between the products."""

from __future__ import annotations

from torch import Tensor

from .declare import op

__all__ = [
    "attention",
    "linear",
    "rms_norm",
]


@op("norm_activation", cuda=("norm_activation",))
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dimension: ``x / sqrt(mean(x * x) + eps) * (offset + weight)``.

    Computed in fp32, rounded once. ``offset`` is 1 for models that store their weight less 1 (Gemma).

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: fp32, bf16 or fp16 [K].
        eps: added to the mean of the squares.
        offset: added to the weight.

    Returns:
        y, of the dtype and shape of ``x``.

    Raises:
        RuntimeError: for another dtype, or a weight that does not have K elements.
    """
    return x.new_empty(x.shape)


@op("linear", why_not_cuda="on a GPU torch's own is used")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` in bf16, made for few rows: the weight is read once, as it lies.

    It serves what stays in floating point, above all the output embedding. Products are summed in fp32, in an order
    that depends on the instruction set, and rounded once.

    Args:
        x: bf16 [..., K].
        weight: bf16 [N, K].
        bias: bf16 [N], or ``None``.

    Returns:
        y, bf16 [..., N].

    Raises:
        RuntimeError: for another dtype, or shapes or devices that do not fit.
    """
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@op("attention", why_not_cuda="on a GPU transformers' own is used")
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
    """Scaled dot-product attention: ``softmax(scale * q @ k.T) @ v`` over the keys that each query may see.

    Scores, softmax and sums are fp32; probabilities of bf16 inputs are rounded to bf16 where the CPU multiplies bf16.
    A query that sees no key gives 0. INT8 keys and values are read as they are: scores are multiplied by ``k_scale``
    and probabilities by ``v_scale``.

    Args:
        q: fp32, bf16 or fp16 [B, H, T, D], any strides.
        k: the same dtype, or int8, [B, Hkv, S, D], where H is a multiple of Hkv: head h reads head h // (H // Hkv).
        v: the dtype of ``k``, [B, Hkv, S, Dv].
        mask: bool [1 or B, 1 or H, T, S], true where a query may see a key; or ``None``.
        scale: positive, usually ``D ** -0.5``.
        causal: whether query i sees only keys up to i + S - T, as the last T of S tokens do.
        k_scale: fp32 [B, Hkv, S], of an int8 ``k``, as ``quantize_per_token`` makes both; ``None`` for others.
        v_scale: the same for ``v``.

    Returns:
        y, of the dtype of ``q`` [B, T, H, Dv], contiguous: heads side by side, as the output projection reads them.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or a scale that is not positive and finite.
    """
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
