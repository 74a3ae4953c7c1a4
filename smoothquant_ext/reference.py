"""The oracle of every op in plain torch: what ``torch.ops.sq`` computes, written for reading.

Every function has the contract of its namesake in ``ops`` and shares no code with the kernels. INT8 results agree with
the kernels bit for bit; FP8 products agree within the rounding of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .scheme import QMAX

PANEL = 64
"""Columns in one panel of a packed weight, and what K is padded to."""


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturates and rounds fp32 values to an 8-bit dtype, half to even. NaN becomes 0 in INT8 and stays NaN in fp8."""
    if dtype == torch.int8:
        values = torch.nan_to_num(values, nan=0.0, posinf=QMAX[dtype], neginf=-QMAX[dtype]).round()
    return values.clamp(-QMAX[dtype], QMAX[dtype]).to(dtype)


def _smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    return x.float() if smooth is None else x.float() / smooth.reshape(-1)


def quantize_per_token(x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``ops.quantize_per_token``."""
    values = _smoothed(x, smooth)
    absmax = values.abs().amax(-1, keepdim=True) if x.shape[-1] else values.new_zeros(*x.shape[:-1], 1)
    finite = values.isfinite().all(-1, keepdim=True)
    qmax = torch.tensor(QMAX[dtype], dtype=torch.float32)
    scale = torch.where(absmax == 0, 1.0, absmax / qmax)
    # qmax / absmax overflows for subnormal rows; the largest float keeps their zeros from becoming 0 * inf.
    multiplier = (qmax / absmax).clamp(max=torch.finfo(torch.float32).max)
    q = _cast(torch.where(finite & (absmax != 0), values * multiplier, 0.0), dtype)
    return q, torch.where(finite, scale, torch.nan).squeeze(-1)


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``ops.quantize_static``."""
    return _cast(x.float() * (1.0 / scale.reshape(())), dtype)


def _quantize(
    x: Tensor, dtype: torch.dtype, a_scale: Tensor | None, smooth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q and the scale of each row, which is NaN where a value is not finite; with a static scale or one per token."""
    if a_scale is None:
        return quantize_per_token(x, dtype, smooth)
    values = _smoothed(x, smooth)
    finite = values.isfinite().all(-1)
    q = quantize_static(torch.where(finite.unsqueeze(-1), values, 0.0), a_scale, dtype)
    return q, torch.where(finite, a_scale.reshape(()), torch.nan)


def prepack_weight(b: Tensor) -> Tensor:
    """See ``ops.prepack_weight``."""
    n, k = b.shape
    panels, rows4 = -(-n // PANEL), -(-k // PANEL) * PANEL // 4
    padded = torch.zeros(panels * PANEL, rows4 * 4, dtype=torch.int8)
    padded[:n, :k] = b.view(torch.int8)
    packed = torch.zeros(panels, rows4 + 1, PANEL, 4, dtype=torch.int8)
    packed[:, :rows4] = padded.view(panels, PANEL, rows4, 4).transpose(1, 2)
    if b.dtype == torch.int8:
        column_sums = padded.sum(1, dtype=torch.int32).view(panels, PANEL, 1)
        packed[:, rows4] = column_sums.view(torch.int8)
    return packed.view(b.dtype)


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """See ``ops.unpack_weight``."""
    panels, rows4 = packed.shape[0], packed.shape[1] - 1
    plain = packed.view(torch.int8)[:, :rows4].transpose(1, 2).reshape(panels * PANEL, rows4 * 4)
    return plain[:out_features, :in_features].contiguous().view(packed.dtype)


def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See ``ops.w8a8_gemm``. Products and sums are fp64: exact for INT8, as K * 127 * 127 < 2^53."""
    if b.dim() == 4:
        b = unpack_weight(b, b_scale.numel(), a.shape[-1])
    a_scale = a_scale.reshape(()) if a_scale.numel() == 1 else a_scale.reshape(*a.shape[:-1], 1)
    b_scale = b_scale.reshape(()) if b_scale.numel() == 1 else b_scale.reshape(-1)
    sums = a.float().double() @ b.float().double().T
    if a.dtype == torch.int8:
        sums = sums.long()  # an integer has no -0
    y = sums.float() * (a_scale * b_scale)
    if bias is not None:
        y = y + bias.float().reshape(-1)
    return y.to(out_dtype)


def w8a8_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``ops.w8a8_linear``."""
    q, scale = _quantize(x, b.dtype, a_scale, smooth)
    return w8a8_gemm(q, b, scale, b_scale, bias, out_dtype or x.dtype)


def w8a8_linears(
    x: Tensor,
    b: Sequence[Tensor],
    b_scale: Sequence[Tensor],
    bias: Sequence[Tensor] = (),
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """See ``ops.w8a8_linears``."""
    biases = list[Tensor | None](bias) or [None] * len(b)
    return [w8a8_linear(x, *own, a_scale, out_dtype=out_dtype) for own in zip(b, b_scale, biases, strict=True)]


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
    """See ``ops.w8a8_mlp``."""
    values = ACTIVATIONS[activation](w8a8_linear(x, gate, gate_scale, gate_bias, a_scale))
    if up is not None:
        assert up_scale is not None
        values = values * w8a8_linear(x, up, up_scale, up_bias, a_scale).float()
    return w8a8_linear(values, down, down_scale, down_bias, down_a_scale, out_dtype=x.dtype)


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
    a_scale: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.rms_norm_quantize``."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = _norm(total, 0.0, weight.float().reshape(-1) + offset, eps)
    return *_quantize(values, dtype, a_scale), x.new_empty(0) if residual is None else total


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    a_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``ops.layer_norm_quantize``."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    values = _norm(total, _lane_sum(total.float()) / float(x.shape[-1]), weight.float().reshape(-1), eps)
    if bias is not None:
        values = values + bias.float().reshape(-1)
    return *_quantize(values, dtype, a_scale), x.new_empty(0) if residual is None else total


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
    gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``ops.silu_mul_quantize``."""
    return _quantize(silu(gate) * up.float(), dtype, a_scale)


def gelu_mul_quantize(
    gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_mul_quantize``."""
    return _quantize(_gelu_of_kind(gate, approximate) * up.float(), dtype, a_scale)


def gelu_quantize(
    x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """See ``ops.gelu_quantize``."""
    return _quantize(_gelu_of_kind(x, approximate), dtype, a_scale)


def relu_quantize(x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``ops.relu_quantize``."""
    return _quantize(relu(x), dtype, a_scale)


def _gelu_of_kind(x: Tensor, approximate: str) -> Tensor:
    return gelu(x) if approximate == "none" else gelu_tanh(x)


# --- floating point -------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See ``ops.linear``. Computed in fp64, rounded once."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double().reshape(-1)).to(x.dtype)


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
    """See ``ops.attention``. Computed in fp64, on dequantized keys and values; rounded once."""
    group = q.shape[1] // max(1, k.shape[1])
    k, v = (
        (x.double() if own is None else x.double() * own.double().unsqueeze(-1)).repeat_interleave(group, 1)
        for x, own in ((k, k_scale), (v, v_scale))
    )
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    visible = visible.expand(q.shape[0], q.shape[1], -1, -1)
    if mask is not None:
        visible = visible & mask
    scores = (scale * q.double() @ k.transpose(2, 3)).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (p @ v).transpose(1, 2).contiguous().to(q.dtype)
