"""Quantization, norms and activations on a GPU through torch alone.

``q`` and ``scale`` of the quantizing ops have the oracle's bits. Norms sum in torch's order and activations are torch's
own, so that what they give to the quantizer differs from the oracle's by a few units in the last place of fp32, and
``q`` by at most one step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...activations import ACTIVATIONS
from ...scheme import QMAX
from .fallback_checks import check

_LARGEST = torch.finfo(torch.float32).max


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """fp32 ``numerator / denominator``, rounded to nearest on every device.

    On a GPU torch multiplies with the reciprocal of a scalar, and compilers approximate fp32 divisions. fp64 has more
    than twice the bits of fp32, so that its quotient rounds to the fp32 one. For a number a row that costs nothing.
    """
    return (numerator.double() / denominator.double()).float()


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturates and rounds fp32 values, of which none is NaN in INT8, to an 8-bit dtype, half to even."""
    if dtype == torch.int8:
        values = values.round()
    return values.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)


def row_absmax(values: Tensor) -> Tensor:
    """fp32 [..., 1]; NaN or infinite for a row that has such a value, 0 for one without values."""
    if values.numel() == 0:
        return values.new_zeros((*values.shape[:-1], 1), dtype=torch.float32)
    low, high = values.aminmax(dim=-1, keepdim=True)
    return torch.maximum(-low, high).float()


def rotated(values: Tensor, block: int) -> Tensor:
    """Values [..., K], each block of them rotated in fp32; as they are for 0.

    Sums and differences are exact fp32 operations everywhere, which a matrix product is not.
    """
    if block == 0:
        return values
    wide, (*leading, k) = values.float(), values.shape
    apart = 1
    while apart < block:
        a, b = wide.reshape(*leading, k // (2 * apart), 2, apart).unbind(-2)
        wide = torch.stack((a + b, a - b), dim=-2)
        apart *= 2
    return wide.reshape(values.shape) * (1 / math.sqrt(block))


def quantize_rows(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, smooth: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """q and the scale of each row of ``x``, which is NaN where a value is not finite.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: of q.
        scale: fp32, one element, for all rows; ``None`` for one a row.
        smooth: fp32 [K], divides ``x`` first, or ``None``.
        rotate: the size of the blocks that are rotated then, or 0.
    """
    values = x.contiguous()
    if smooth is not None:
        values = values.float() / smooth.reshape(-1)
    values = rotated(values, rotate)
    absmax = row_absmax(values)
    is_finite = absmax.isfinite()
    if scale is not None:
        own = scale.reshape(())
        q = quantize_with(values.masked_fill(~is_finite, 0.0), own, dtype)
        return q, torch.where(is_finite, own, torch.nan).squeeze(-1)
    qmax = torch.full_like(absmax, QMAX[dtype])
    # It overflows for subnormal rows; the largest float keeps their zeros from becoming 0 * inf.
    multiplier = ratio(qmax, absmax).clamp(max=_LARGEST)
    q = cast((values * multiplier).masked_fill(~is_finite | (absmax == 0), 0.0), dtype)
    row_scale = torch.where(absmax == 0, 1.0, ratio(absmax, qmax))
    return q, torch.where(is_finite, row_scale, torch.nan).squeeze(-1)


def quantize_with(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantizes values with one scale, fp32 []."""
    products = values.float() * ratio(torch.ones_like(scale), scale)
    return cast(products.nan_to_num(nan=0.0) if dtype == torch.int8 else products, dtype)


def quantize_per_token(
    x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.quantize_per_token``."""
    check("quantize", "quantize_per_token", x, dtype, smooth, None, rotate)
    return quantize_rows(x, dtype, smooth=smooth, rotate=rotate)


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype, rotate: int = 0) -> Tensor:
    """See ``ops.quantize_static``."""
    check("quantize", "quantize_static", x, dtype, None, scale, rotate)
    return quantize_with(rotated(x.contiguous(), rotate), scale.reshape(()), dtype)


# --- norms ----------------------------------------------------------------------------------------------------------


def _normalized(wide: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``wide / sqrt(mean(wide * wide) + eps) * weight`` of fp32 [..., K] and [K]."""
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See ``ops.rms_norm``."""
    check("norm", "rms_norm", x, weight)
    return _normalized(x.contiguous().float(), weight.reshape(-1).float() + offset, eps).to(x.dtype)


def _summed(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is normalized, and the third result of the ops: ``x + residual``, empty without a residual."""
    if residual is None:
        return x.contiguous(), x.new_empty(0)
    total = x.contiguous() + residual.contiguous()  # torch adds in fp32 and rounds once
    return total, total


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.rms_norm_quantize``."""
    check("norm_quantize", "rms_norm_quantize", x, weight, None, dtype, residual, scale)
    total, result = _summed(x, residual)
    values = _normalized(total.float(), weight.reshape(-1).float() + offset, eps)
    return *quantize_rows(values, dtype, scale), result


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.layer_norm_quantize``."""
    check("norm_quantize", "layer_norm_quantize", x, weight, bias, dtype, residual, scale)
    total, result = _summed(x, residual)
    wide = total.float()
    values = _normalized(wide - wide.mean(-1, keepdim=True), weight.reshape(-1).float(), eps)
    if bias is not None:
        values = values + bias.reshape(-1).float()
    return *quantize_rows(values, dtype, scale), result


# --- activations ----------------------------------------------------------------------------------------------------


def activate(name: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """fp32 ``act(gate)``, times ``up`` where there is one."""
    values = ACTIVATIONS[name](gate.contiguous().float())
    return values if up is None else values * up.contiguous()


def _gelu(approximate: str) -> str:
    """What ``ACTIVATIONS`` calls this kind."""
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def silu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.silu_mul_quantize``."""
    check("activate_quantize", "silu_mul_quantize", gate, up, dtype, scale, "none", rotate)
    return quantize_rows(activate("silu", gate, up), dtype, scale, rotate=rotate)


def gelu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    approximate: str = "none",
    rotate: int = 0,
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_mul_quantize``."""
    check("activate_quantize", "gelu_mul_quantize", gate, up, dtype, scale, approximate, rotate)
    return quantize_rows(activate(_gelu(approximate), gate, up), dtype, scale, rotate=rotate)


def gelu_quantize(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, approximate: str = "none", rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_quantize``."""
    check("activate_quantize", "gelu_quantize", x, None, dtype, scale, approximate, rotate)
    return quantize_rows(activate(_gelu(approximate), x), dtype, scale, rotate=rotate)


def relu_quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0) -> tuple[Tensor, Tensor]:
    """See ``ops.relu_quantize``."""
    check("activate_quantize", "relu_quantize", x, None, dtype, scale, "none", rotate)
    return quantize_rows(activate("relu", x), dtype, scale, rotate=rotate)
