"""Quantization of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .declare import op

__all__ = [
    "quantize_per_token",
    "quantize_static",
]


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty q and scales of the rows of ``x``."""
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@op("quantize", cuda=("quantize",))
def quantize_per_token(
    x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantizes every row of ``x`` (divided by ``smooth`` and rotated first) with its own scale.

    ``scale = absmax / qmax`` and ``q = round(x * (qmax / absmax))``, half to even, in fp32; qmax is 127, 448 (e4m3fn)
    or 57344 (e5m2). A row of zeros gets scale 1; a row with a NaN or an infinity gets scale NaN and q = 0.

    A rotation multiplies each block of B values by Sylvester's Hadamard matrix over ``sqrt(B)``, which spreads outliers
    and is its own inverse (QuaRot, Ashkboos et al. 2024, section 4.2, in blocks). In fp32: for h = 1, 2, 4, ... B / 2
    the pairs (a, b) of values h apart become (a + b, a - b); the results are multiplied by ``1 / sqrt(B)``.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        smooth: fp32 [K], or ``None``.
        rotate: B, a power of two from 16 to 256 that divides K; 0 for no rotation.

    Returns:
        q, of ``dtype`` [..., K], and scale, fp32 [...].

    Raises:
        RuntimeError: for another dtype, a ``smooth`` that does not have K elements, or another ``rotate``.
    """
    return quantized(x, dtype)


@op("quantize", cuda=("quantize",))
def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype, rotate: int = 0) -> Tensor:
    """Quantizes ``x`` with one given scale: ``q = round(x * (1 / scale))``, half to even, saturating at +-qmax.

    NaN becomes 0 in INT8 and NaN in fp8. A rotation comes first, as in ``quantize_per_token``.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        scale: fp32, one element, positive and finite.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        rotate: the size of its blocks, or 0.

    Returns:
        q, of ``dtype`` [..., K].

    Raises:
        RuntimeError: for another dtype or ``rotate``, or a scale that is not one positive finite fp32 number.
    """
    return x.new_empty(x.shape, dtype=dtype)
