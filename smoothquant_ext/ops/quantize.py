"""Ops that quantize activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .fakes import check_devices, quantized

_quantize_per_token = torch.ops.sq.quantize_per_token.default


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


@torch.library.register_fake("sq::quantize_per_token")
def _(x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_devices("quantize_per_token", "x", x, smooth=smooth)
    return quantized(x, dtype)


_quantize_static = torch.ops.sq.quantize_static.default


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


@torch.library.register_fake("sq::quantize_static")
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    check_devices("quantize_static", "x", x, scale=scale)
    return x.new_empty(x.shape, dtype=dtype)
