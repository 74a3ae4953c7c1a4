"""The 8-bit ops: typed wrappers of ``torch.ops.sq``.

Letters in shapes: M tokens (any leading shape), K input features, N output features. A real value is ``q * scale``.
Arguments that do not fit raise ``RuntimeError`` with one sentence that names the op and the argument. Non-contiguous
tensors are accepted. ``reference`` holds the same functions in plain torch, which the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fake_kernels as fake_kernels
from .backends import CPU_ISAS, OpInfo, cpu_isa, has_fast_linear, info
from .reference import unpack_weight as _unpack_weight

__all__ = [
    "CPU_ISAS",
    "OpInfo",
    "attention",
    "cpu_isa",
    "gelu_mul_quantize",
    "gelu_quantize",
    "has_fast_linear",
    "info",
    "layer_norm_quantize",
    "linear",
    "prepack_weight",
    "quantize_per_token",
    "quantize_static",
    "relu_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "unpack_weight",
    "w8a8_decoder_layer_",
    "w8a8_gemm",
    "w8a8_linear",
    "w8a8_linears",
    "w8a8_mlp",
]

# Looked up once: every dot in torch.ops.sq.x.default costs as much as a small kernel.
_attention = torch.ops.sq.attention.default
_gelu_mul_quantize = torch.ops.sq.gelu_mul_quantize.default
_gelu_quantize = torch.ops.sq.gelu_quantize.default
_layer_norm_quantize = torch.ops.sq.layer_norm_quantize.default
_linear = torch.ops.sq.linear.default
_prepack_weight = torch.ops.sq.prepack_weight.default
_quantize_per_token = torch.ops.sq.quantize_per_token.default
_quantize_static = torch.ops.sq.quantize_static.default
_relu_quantize = torch.ops.sq.relu_quantize.default
_rms_norm = torch.ops.sq.rms_norm.default
_rms_norm_quantize = torch.ops.sq.rms_norm_quantize.default
_silu_mul_quantize = torch.ops.sq.silu_mul_quantize.default
_w8a8_decoder_layer_ = torch.ops.sq.w8a8_decoder_layer_.default
_w8a8_gemm = torch.ops.sq.w8a8_gemm.default
_w8a8_linear = torch.ops.sq.w8a8_linear.default
_w8a8_linears = torch.ops.sq.w8a8_linears.default
_w8a8_mlp = torch.ops.sq.w8a8_mlp.default


# --- quantization and products --------------------------------------------------------------------------------------


def quantize_per_token(x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes every row of ``x`` (divided by ``smooth`` first) with its own scale.

    ``scale = absmax / qmax`` and ``q = round(x * (qmax / absmax))``, half to even, in fp32; qmax is 127, 448 (e4m3fn)
    or 57344 (e5m2). A row of zeros gets scale 1; a row with a NaN or an infinity gets scale NaN and q = 0.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        smooth: fp32 [K], or ``None``.

    Returns:
        q, of ``dtype`` [..., K], and scale, fp32 [...].

    Raises:
        RuntimeError: for another dtype, or a ``smooth`` that does not have K elements.
    """
    q, scale = _quantize_per_token(x, dtype, smooth)
    return q, scale


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantizes ``x`` with one given scale: ``q = round(x * (1 / scale))``, half to even, saturating at +-qmax.

    NaN becomes 0 in INT8 and NaN in fp8.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        scale: fp32, one element, positive and finite.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        q, of ``dtype`` [..., K].

    Raises:
        RuntimeError: for another dtype, or a scale that is not one positive finite fp32 number.
    """
    q: Tensor = _quantize_static(x, scale, dtype)
    return q


def prepack_weight(b: Tensor) -> Tensor:
    """Reorders a weight for the CPU kernels, so that a product need not do it on every call.

    Args:
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], on the CPU.

    Returns:
        The same dtype, [ceil(N / 64), ceil(K / 64) * 16 + 1, 64, 4], where element [p, k4, n, j] is
        b[64 p + n, 4 k4 + j], zero padded; the last k4 row of an INT8 weight holds the int32 sums of its columns. The
        layout is the same on every CPU.

    Raises:
        RuntimeError: for another dtype or shape, or an INT8 K above 133144.
    """
    packed: Tensor = _prepack_weight(b)
    return packed


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features] that ``prepack_weight`` packed."""
    return _unpack_weight(packed, out_features, in_features)


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


def w8a8_decoder_layer_(
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor,
    eps: float,
    post_eps: float,
    offset: float,
    b: Sequence[Tensor],
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    a_scale: Sequence[Tensor],
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
) -> Tensor:
    """A decoder layer of the Llama family: ``h = x + o(attention(q, k, v))``, ``y = h + mlp(rms_norm(h))``.

    q, k and v are the layers of ``rms_norm(x)``; q and k are rotated by ``cos`` and ``sin`` (Su et al. 2021, the halves
    of a head being the two coordinates). It has the bits of ``rms_norm``, ``w8a8_linears``, torch's rotation,
    ``attention``, ``w8a8_linear``, torch's addition and ``w8a8_mlp`` one after the other; with an INT8 cache, also of
    ``quantize_per_token`` of the new keys, once rotated, and values.

    Args:
        x: fp32, bf16 or fp16 [B, T, K].
        norm: fp32, bf16 or fp16 [K], the weight of the first norm.
        post_norm: the same of the second one.
        eps: of the first norm.
        post_eps: of the second one.
        offset: added to the weights of both norms.
        b: the 8-bit weights of q, k, v, o, gate, up and down, plain or packed, of one dtype.
        b_scale: their scales.
        bias: seven biases, an empty tensor where there is none; or nothing at all.
        a_scale: static scales of the inputs of q/k/v, o, gate/up and down, an empty tensor for scales per token; or
            nothing for scales per token everywhere.
        cos: of the dtype of ``x`` [1 or B, T, D].
        sin: the same.
        keys: of the dtype of ``x``, or int8, [B, Hkv, room, D], contiguous; gets T more tokens behind ``past``.
        values: the same dtype and, but for the room, shape.
        past: tokens that are in ``keys`` and ``values``.
        mask: bool [1 or B, 1 or H, T, past + T], true where a query may see a key; or ``None``.
        scale: of the attention, usually ``D ** -0.5``.
        causal: whether query i sees only keys up to past + i.
        activation: of the MLP, see ``w8a8_mlp``.
        keys_scale: fp32 [B, Hkv, room], contiguous, of int8 ``keys``; gets T more as well. ``None`` for others.
        values_scale: the same for ``values``.

    Returns:
        y, of the dtype of ``x`` [B, T, K].

    Raises:
        RuntimeError: for dtypes, shapes, devices or numbers of tensors that do not fit.
    """
    y: Tensor = _w8a8_decoder_layer_(
        x,
        norm,
        post_norm,
        eps,
        post_eps,
        offset,
        b,
        b_scale,
        bias,
        a_scale,
        cos,
        sin,
        keys,
        values,
        past,
        mask,
        scale,
        causal,
        activation,
        keys_scale,
        values_scale,
    )
    return y


# --- norms and activations that quantize ----------------------------------------------------------------------------


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    a_scale: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual addition, RMS norm and quantization in one pass: quantizes ``rms_norm(x + residual, weight, eps)``.

    The sum is rounded to the dtype of ``x``, as a model stores it; the norm stays in fp32 until it is quantized.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: fp32, bf16 or fp16 [K].
        eps: added to the mean of the squares.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        residual: of the dtype and shape of ``x``, or ``None``.
        a_scale: fp32, one element (see ``quantize_static``), or ``None`` for one a row (see ``quantize_per_token``).
        offset: added to the weight.

    Returns:
        q, of ``dtype`` [..., K]; scale, fp32 [...], with a static scale this one, or NaN for a row that is not finite;
        and ``x + residual``, or an empty tensor without a residual.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or a scale that is not positive and finite.
    """
    q, scale, total = _rms_norm_quantize(x, weight, eps, dtype, residual, a_scale, offset)
    return q, scale, total


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    a_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual addition, layer norm and quantization in one pass.

    With ``h = x + residual``, rounded to the dtype of ``x``, quantizes ``(h - mean(h)) / sqrt(var(h) + eps) * weight +
    bias``; the variance is that of the deviations from the mean, all in fp32.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: fp32, bf16 or fp16 [K].
        bias: the same, or ``None``.
        eps: added to the variance.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        residual: of the dtype and shape of ``x``, or ``None``.
        a_scale: fp32, one element, or ``None`` for a scale per row.

    Returns:
        As ``rms_norm_quantize``.

    Raises:
        RuntimeError: as ``rms_norm_quantize``.
    """
    q, scale, total = _layer_norm_quantize(x, weight, bias, eps, dtype, residual, a_scale)
    return q, scale, total


def silu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The activation of a SwiGLU MLP and its quantization in one pass: quantizes ``gate / (1 + exp(-gate)) * up``.

    Computed in fp32 and not rounded before it is quantized; exp has an error under 2 ulp and is the same on every CPU.

    Args:
        gate: fp32, bf16 or fp16 [..., K].
        up: the same dtype and shape.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        a_scale: fp32, one element, or ``None`` for a scale per row.

    Returns:
        q, of ``dtype`` [..., K]; scale, fp32 [...], with a static scale this one, or NaN for a row that is not finite.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or a scale that is not positive and finite.
    """
    q, scale = _silu_mul_quantize(gate, up, dtype, a_scale)
    return q, scale


def gelu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """The activation of a GeGLU MLP and its quantization in one pass: quantizes ``gelu(gate, approximate) * up``.

    See ``gelu_quantize`` for the function, ``silu_mul_quantize`` for arguments and results.
    """
    q, scale = _gelu_mul_quantize(gate, up, dtype, a_scale, approximate)
    return q, scale


def gelu_quantize(
    x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """GELU (Hendrycks and Gimpel 2016) and quantization in one pass.

    Computed in fp32: ``x * Phi(x)``, with the normal distribution from a fit of the complementary error function
    (Numerical Recipes, erfcc, relative error 1.2e-7); or ``x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))``, that is
    the approximation by tanh.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        a_scale: fp32, one element, or ``None`` for a scale per row.
        approximate: ``"none"`` or ``"tanh"``, as in torch.

    Returns:
        As ``silu_mul_quantize``.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, another approximation, or a scale that is not
            positive and finite.
    """
    q, scale = _gelu_quantize(x, dtype, a_scale, approximate)
    return q, scale


def relu_quantize(x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes ``relu(x)`` in one pass. A NaN stays one, and -inf becomes 0.

    See ``silu_mul_quantize`` for arguments and results.
    """
    q, scale = _relu_quantize(x, dtype, a_scale)
    return q, scale


# --- what stays in floating point -----------------------------------------------------------------------------------


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
    y: Tensor = _rms_norm(x, weight, eps, offset)
    return y


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
    y: Tensor = _linear(x, weight, bias)
    return y


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
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
    y: Tensor = _attention(q, k, v, mask, scale=scale, causal=causal, k_scale=k_scale, v_scale=v_scale)
    return y
