"""Norms and activations that quantize what they compute, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import op
from .quantize import quantized

__all__ = [
    "gelu_mul_quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "relu_quantize",
    "rms_norm_quantize",
    "silu_mul_quantize",
]


@op("norm_activation", cuda=("norm_activation",))
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
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
        scale: fp32, one element (see ``quantize_static``), or ``None`` for one a row (see ``quantize_per_token``).
        offset: added to the weight.

    Returns:
        q, of ``dtype`` [..., K]; scale, fp32 [...], with a static scale this one, or NaN for a row that is not finite;
        and ``x + residual``, or an empty tensor without a residual.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or a scale that is not positive and finite.
    """
    return *quantized(x, dtype), x.new_empty((0,) if residual is None else x.shape)


@op("norm_activation", cuda=("norm_activation",))
def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
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
        scale: fp32, one element, or ``None`` for a scale per row.

    Returns:
        As ``rms_norm_quantize``.

    Raises:
        RuntimeError: as ``rms_norm_quantize``.
    """
    return *quantized(x, dtype), x.new_empty((0,) if residual is None else x.shape)


@op("norm_activation", cuda=("norm_activation",))
def silu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """The activation of a SwiGLU MLP and its quantization in one pass: quantizes ``gate / (1 + exp(-gate)) * up``.

    Computed in fp32 and not rounded before it is quantized; exp has an error under 2 ulp and is the same on every CPU.

    Args:
        gate: fp32, bf16 or fp16 [..., K].
        up: the same dtype and shape.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: fp32, one element, or ``None`` for a scale per row.
        rotate: the size of the blocks that are rotated before, see ``quantize_per_token``; 0 for none.

    Returns:
        q, of ``dtype`` [..., K]; scale, fp32 [...], with a static scale this one, or NaN for a row that is not finite.

    Raises:
        RuntimeError: for dtypes, shapes, devices or a ``rotate`` that do not fit, or a scale that is not positive and
            finite.
    """
    return quantized(gate, dtype)


@op("norm_activation", cuda=("norm_activation",))
def gelu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    approximate: str = "none",
    rotate: int = 0,
) -> tuple[Tensor, Tensor]:
    """The activation of a GeGLU MLP and its quantization in one pass: quantizes ``gelu(gate, approximate) * up``.

    See ``gelu_quantize`` for the function, ``silu_mul_quantize`` for arguments and results.
    """
    return quantized(gate, dtype)


@op("norm_activation", cuda=("norm_activation",))
def gelu_quantize(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, approximate: str = "none", rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """GELU (Hendrycks and Gimpel 2016) and quantization in one pass.

    Computed in fp32: ``x * Phi(x)``, with the normal distribution from a fit of the complementary error function
    (Numerical Recipes, erfcc, relative error 1.2e-7); or ``x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))``, that is
    the approximation by tanh.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        scale: fp32, one element, or ``None`` for a scale per row.
        approximate: ``"none"`` or ``"tanh"``, as in torch.
        rotate: as in ``silu_mul_quantize``.

    Returns:
        As ``silu_mul_quantize``.

    Raises:
        RuntimeError: for dtypes, shapes, devices or a ``rotate`` that do not fit, another approximation, or a scale
            that is not positive and finite.
    """
    return quantized(x, dtype)


@op("norm_activation", cuda=("norm_activation",))
def relu_quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0) -> tuple[Tensor, Tensor]:
    """Quantizes ``relu(x)`` in one pass. A NaN stays one, and -inf becomes 0.

    See ``silu_mul_quantize`` for arguments and results.
    """
    return quantized(x, dtype)
