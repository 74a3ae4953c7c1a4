"""Oracles of the norms and activations, alone and with quantization."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .quantize import quantize_with

__all__ = [
    "ACTIVATIONS",
    "gelu",
    "gelu_mul_quantize",
    "gelu_quantize",
    "gelu_tanh",
    "layer_norm_quantize",
    "relu",
    "relu_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu",
    "silu_mul_quantize",
]

# --- norms ----------------------------------------------------------------------------------------------------------

LANES = 64
"""Partial sums of a norm, added pairwise at the end."""


def _lane_sum(values: Tensor) -> Tensor:
    """fp32 sum over the last dimension, kept as 1, in the kernels' order: lane k % 64 takes element k."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    lanes = padded.new_zeros(*values.shape[:-1], LANES)
    for part in padded.split(LANES, dim=-1):
        lanes = lanes + part
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes


def _norm(x: Tensor, mean: Tensor | float, weight: Tensor, eps: float) -> Tensor:
    """fp32 ``(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight``."""
    deviations = x.float() - mean
    variance = _lane_sum(deviations.square()) / float(x.shape[-1]) + torch.tensor(eps, dtype=torch.float32)
    gain = 1.0 / variance.double().sqrt().float()  # torch's fp32 square root is not always the nearest one
    return deviations * gain * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See ``ops.rms_norm``."""
    return _norm(x, 0.0, weight.float().reshape(-1) + offset, eps).to(x.dtype)


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
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = _norm(total, 0.0, weight.float().reshape(-1) + offset, eps)
    return *quantize_with(values, dtype, scale), x.new_empty(0) if residual is None else total


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
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = _norm(total, _lane_sum(total.float()) / float(x.shape[-1]), weight.float().reshape(-1), eps)
    if bias is not None:
        values = values + bias.float().reshape(-1)
    return *quantize_with(values, dtype, scale), x.new_empty(0) if residual is None else total


# --- activations ----------------------------------------------------------------------------------------------------


def _exp(x: Tensor) -> Tensor:
    """The kernels' exponential: Cephes' polynomial, one rounding a step."""
    x = x.clamp(-87.0, 60.0)
    n = (x * 1.44269504088896341).round()
    r = x - n * 0.693359375 - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    return p * torch.exp2(n)


def silu(x: Tensor) -> Tensor:
    """fp32 ``x / (1 + exp(-x))``."""
    return x.float() / (1.0 + _exp(-x.float()))


def gelu(x: Tensor) -> Tensor:
    """fp32 ``x * Phi(x)``; see ``ops.gelu_quantize``."""
    x = x.float()
    z = x.abs() * 0.70710678118654752
    t = 1.0 / (1.0 + 0.5 * z)
    p = torch.full_like(t, 0.17087277)
    for coefficient in (
        -0.82215223,
        1.48851587,
        -1.13520398,
        0.27886807,
        -0.18628806,
        0.09678418,
        0.37409196,
        1.00002368,
        -1.26551223,
    ):
        p = p * t + coefficient
    tail = 0.5 * t * _exp(p - z * z)
    return x * torch.where(x < 0, tail, 1.0 - tail)


def gelu_tanh(x: Tensor) -> Tensor:
    """fp32 ``x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    x = x.float()
    return x / (1.0 + _exp(x * -1.5957691216057308 * (1.0 + 0.044715 * (x * x))))


def relu(x: Tensor) -> Tensor:
    """fp32, a NaN stays one."""
    x = x.float()
    return torch.where(x < 0, 0.0, x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
}


def silu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.silu_mul_quantize``."""
    return quantize_with(silu(gate) * up.float(), dtype, scale, rotate=rotate)


def gelu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    approximate: str = "none",
    rotate: int = 0,
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_mul_quantize``."""
    return quantize_with(_gelu_of_kind(gate, approximate) * up.float(), dtype, scale, rotate=rotate)


def gelu_quantize(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, approximate: str = "none", rotate: int = 0
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_quantize``."""
    return quantize_with(_gelu_of_kind(x, approximate), dtype, scale, rotate=rotate)


def relu_quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None, rotate: int = 0) -> tuple[Tensor, Tensor]:
    """See ``ops.relu_quantize``."""
    return quantize_with(relu(x), dtype, scale, rotate=rotate)


def _gelu_of_kind(x: Tensor, approximate: str) -> Tensor:
    return gelu(x) if approximate == "none" else gelu_tanh(x)
