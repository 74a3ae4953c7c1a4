"""8-bit matrix products, alone and as linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import packed_shape
from .declare import op

__all__ = [
    "prepack_weight",
    "w8a8_gemm",
    "w8a8_linear",
    "w8a8_linear_group",
    "w8a8_mlp",
]


def out_features(weight: Tensor, weight_scale: Tensor) -> int:
    """N of a weight, plain or packed."""
    return weight.shape[0] if weight.dim() == 2 else weight_scale.numel()


@op("pack", why_not_cuda="the CUDA kernels read a weight as it lies")
def prepack_weight(weight: Tensor) -> Tensor:
    """Reorders a weight for the CPU kernels, so that a product need not do it on every call.

    Args:
        weight: int8, float8_e4m3fn or float8_e5m2 [N, K], on the CPU; or the weights [E, N, K] of E experts.

    Returns:
        The same dtype, [ceil(N / 64), ceil(K / 64) * 16 + 1, 64, 4], where element [p, k4, n, j] is
        weight[64 p + n, 4 k4 + j], zero padded; the last k4 row of an INT8 weight holds the int32 sums of its columns.
        The layout is the same on every CPU. Of [E, N, K] the weights are packed one after the other: [E, ...].

    Raises:
        RuntimeError: for another dtype or shape, or an INT8 K above 131071.
    """
    *experts, n, k = weight.shape
    return weight.new_empty(*experts, *packed_shape(n, k))


@op("gemm", cuda=("gemm",))
def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product of 8-bit matrices: ``y = (a @ b.T) * (a_scale * b_scale) + bias``.

    INT8 sums are exact; then the product of the scales, the scaling, the bias and the cast round once each, so that
    every kernel gives the same bits. FP8 products are summed in fp32.

    Args:
        a: int8 [..., K]; or float8_e4m3fn or float8_e5m2.
        b: [N, K], or packed; int8 when ``a`` is, else either float8.
        a_scale: fp32, 1 or M elements, any shape.
        b_scale: fp32, 1 or N elements, any shape; N elements when ``b`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        out_dtype: fp32, bf16 or fp16.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 131071.
    """
    return a.new_empty((*a.shape[:-1], out_features(b, b_scale)), dtype=out_dtype)


@op("gemm", cuda=("quantize", "gemm"))
def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> Tensor:
    """Quantizes ``x`` and multiplies it with an 8-bit weight: a linear layer in one call.

    The activation gets the dtype of ``weight``. A row of ``x`` with a NaN or an infinity gives a row of NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: int8, float8_e4m3fn or float8_e5m2 [N, K], or packed.
        weight_scale: fp32, 1 or N elements, any shape; N elements when ``weight`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        input_scale: fp32, one element (see ``quantize_static``), or ``None`` for one a row (see
            ``quantize_per_token``).
        smooth: fp32 [K], divides ``x`` first, or ``None``.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``x``.
        rotate: the size of the blocks of ``x`` that are rotated, after the division, see ``quantize_per_token``; 0 for
            none. The weight is that of a layer whose rows were rotated alike.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes, devices or a ``rotate`` that do not fit, or an INT8 K above 131071.
    """
    return x.new_empty((*x.shape[:-1], out_features(weight, weight_scale)), dtype=out_dtype or x.dtype)


@op("gemm", cuda=("quantize", "gemm"))
def w8a8_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> list[Tensor]:
    """Several linear layers of one input, such as q, k and v: ``w8a8_linear(x, weight[i], ...)`` of each.

    ``x`` is quantized once, and the products are one piece of work for all threads. The results have the bits of the
    single calls.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: weights of one dtype, each as ``w8a8_linear`` takes it, with the same K.
        weight_scale: one for each weight.
        bias: one for each weight, or ``None`` where a layer has none; ``None`` or an empty list if no layer has one.
        input_scale: fp32, one element, or ``None`` for a scale per row.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``x``.
        rotate: as in ``w8a8_linear``.

    Returns:
        One y, of ``out_dtype`` [..., N], for each weight.

    Raises:
        RuntimeError: for dtypes, shapes, devices or numbers of tensors that do not fit.
    """
    widths = [out_features(each, scale) for each, scale in zip(weight, weight_scale, strict=True)]
    return [x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype) for n in widths]


@op("gemm", cuda=("quantize", "norm_activation", "gemm"))
def w8a8_mlp(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """An MLP of 8-bit linear layers: ``down(act(gate(x)) * up(x))`` of three, ``down(act(first(x)))`` of two.

    ``x`` is quantized once. The outputs of gate and up are rounded to the dtype of ``x``, as those of ``w8a8_linear``
    are; the activation and the product are computed in fp32 and go to the second quantization unrounded.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: (gate, up, down) or (first, down), 8 bits of one dtype, plain or packed: [I, K], and [N, I] of down.
        weight_scale: one for each weight, as ``w8a8_linear`` takes it.
        bias: one for each weight, or ``None`` where a layer has none; ``None`` or an empty list if no layer has one.
        input_scale: fp32, one element, of ``x`` and of the input of down, ``None`` for a scale per row; ``None`` or an
            empty list for scales per row of both.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``, see ``silu_mul_quantize`` and the others.
        rotate: of ``x`` and of the input of down, each as in ``w8a8_linear``; an empty list for none.

    Returns:
        y, of the dtype of ``x`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes, devices or numbers of tensors that do not fit, or another activation.
    """
    return x.new_empty((*x.shape[:-1], out_features(weight[-1], weight_scale[-1])))
