"""8-bit matrix products, alone and as linear layers and MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.gemm import unpack_weight as _unpack_weight
from .fakes import check_devices, out_features

_prepack_weight = torch.ops.sq.prepack_weight.default


def prepack_weight(b: Tensor) -> Tensor:
    """Reorders a weight for the CPU kernels, so that a product need not do it on every call.

    Args:
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], on the CPU; or the weights [E, N, K] of E experts.

    Returns:
        The same dtype, [ceil(N / 64), ceil(K / 64) * 16 + 1, 64, 4], where element [p, k4, n, j] is
        b[64 p + n, 4 k4 + j], zero padded; the last k4 row of an INT8 weight holds the int32 sums of its columns. The
        layout is the same on every CPU. Of [E, N, K] the weights are packed one after the other: [E, ...].

    Raises:
        RuntimeError: for another dtype or shape, or an INT8 K above 133144.
    """
    packed: Tensor = _prepack_weight(b)
    return packed


@torch.library.register_fake("sq::prepack_weight")
def _(b: Tensor) -> Tensor:
    *experts, n, k = b.shape
    return b.new_empty(*experts, (n + 63) // 64, (k + 63) // 64 * 16 + 1, 64, 4)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features] that ``prepack_weight`` packed."""
    return _unpack_weight(packed, out_features, in_features)


_w8a8_gemm = torch.ops.sq.w8a8_gemm.default


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
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 133144.
    """
    y: Tensor = _w8a8_gemm(a, b, a_scale, b_scale, bias, out_dtype)
    return y


@torch.library.register_fake("sq::w8a8_gemm")
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    check_devices("w8a8_gemm", "a", a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    return a.new_empty((*a.shape[:-1], out_features(b, b_scale)), dtype=out_dtype)


_w8a8_linear = torch.ops.sq.w8a8_linear.default


def w8a8_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantizes ``x`` and multiplies it with an 8-bit weight: a linear layer in one call.

    The activation gets the dtype of ``b``. A row of ``x`` with a NaN or an infinity gives a row of NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], or packed.
        b_scale: fp32, 1 or N elements, any shape; N elements when ``b`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        a_scale: fp32, one element (see ``quantize_static``), or ``None`` for one a row (see ``quantize_per_token``).
        smooth: fp32 [K], divides ``x`` first, or ``None``.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``x``.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 133144.
    """
    y: Tensor = _w8a8_linear(x, b, b_scale, bias, a_scale, smooth, out_dtype)
    return y


@torch.library.register_fake("sq::w8a8_linear")
def _(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_devices("w8a8_linear", "x", x, b=b, b_scale=b_scale, bias=bias, a_scale=a_scale, smooth=smooth)
    return x.new_empty((*x.shape[:-1], out_features(b, b_scale)), dtype=out_dtype or x.dtype)


_w8a8_linears = torch.ops.sq.w8a8_linears.default


def w8a8_linears(
    x: Tensor,
    b: Sequence[Tensor],
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Several linear layers of one input, such as q, k and v: ``[w8a8_linear(x, b[i], b_scale[i], ...), ...]``.

    ``x`` is quantized once, and the products are one piece of work for all threads. The results have the bits of the
    single calls.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        b: weights of one dtype, each as ``w8a8_linear`` takes it, with the same K.
        b_scale: one for each weight.
        bias: one for each weight, or none at all.
        a_scale: fp32, one element, or ``None`` for a scale per row.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``x``.

    Returns:
        One y, of ``out_dtype`` [..., N], for each weight.

    Raises:
        RuntimeError: for dtypes, shapes, devices or numbers of tensors that do not fit.
    """
    y: list[Tensor] = _w8a8_linears(x, b, b_scale, bias, a_scale, out_dtype)
    return y


@torch.library.register_fake("sq::w8a8_linears")
def _(
    x: Tensor,
    b: list[Tensor],
    b_scale: list[Tensor],
    bias: list[Tensor],
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    outputs = []
    for index, (weight, scale) in enumerate(zip(b, b_scale, strict=True)):
        own_bias = bias[index] if bias else None
        check_devices("w8a8_linears", "x", x, b=weight, b_scale=scale, bias=own_bias, a_scale=a_scale)
        outputs.append(x.new_empty((*x.shape[:-1], out_features(weight, scale)), dtype=out_dtype or x.dtype))
    return outputs


_w8a8_mlp = torch.ops.sq.w8a8_mlp.default


def w8a8_mlp(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    down_a_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """A whole MLP of 8-bit linear layers: ``down(act(gate(x)) * up(x))``, or ``down(act(gate(x)))`` without ``up``.

    ``x`` is quantized once. The outputs of gate and up are rounded to the dtype of ``x``, as those of ``w8a8_linear``
    are; the activation and the product are computed in fp32 and go to the second quantization unrounded.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        gate: the weight [I, K], 8 bits, plain or packed; named for gated MLPs, the first layer of others.
        gate_scale: fp32, 1 or I elements; I when ``gate`` is packed.
        down: the weight [N, I].
        down_scale: fp32, 1 or N elements; N when ``down`` is packed.
        up: the weight [I, K], of the dtype of ``gate``, or ``None``.
        up_scale: its scale.
        gate_bias: fp32, bf16 or fp16 [I], or ``None``.
        up_bias: the same.
        down_bias: fp32, bf16 or fp16 [N], or ``None``.
        a_scale: fp32, one element, of ``x``; ``None`` for a scale per row.
        down_a_scale: fp32, one element, of the input of ``down``; ``None`` for a scale per row.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``, see ``silu_mul_quantize`` and the others.

    Returns:
        y, of the dtype of ``x`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or another activation.
    """
    y: Tensor = _w8a8_mlp(
        x,
        gate,
        gate_scale,
        down,
        down_scale,
        up,
        up_scale,
        gate_bias,
        up_bias,
        down_bias,
        a_scale,
        down_a_scale,
        activation,
    )
    return y


@torch.library.register_fake("sq::w8a8_mlp")
def _(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    down_a_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    check_devices("w8a8_mlp", "x", x, gate=gate, gate_scale=gate_scale, down=down, down_scale=down_scale, up=up)
    return x.new_empty((*x.shape[:-1], out_features(down, down_scale)))
