"""The oracle of every op in plain torch: what ``torch.ops.sq`` computes, written for reading.

Every function has the contract of its namesake in ``ops`` and shares no code with the kernels. INT8 results agree with
the kernels bit for bit; FP8 products agree within the rounding of fp32 sums.
"""

from __future__ import annotations

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
    if a_scale is None:
        q, scale = quantize_per_token(x, b.dtype, smooth)
    else:
        values = _smoothed(x, smooth)
        finite = values.isfinite().all(-1)
        q = quantize_static(torch.where(finite.unsqueeze(-1), values, 0.0), a_scale, b.dtype)
        scale = torch.where(finite, a_scale.reshape(()), torch.nan)
    return w8a8_gemm(q, b, scale, b_scale, bias, out_dtype or x.dtype)


LANES = 16
"""Partial sums of ``rms_norm``, added pairwise at the end."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See ``ops.rms_norm``. The order of the sum is the kernels' own: lane k % 16 takes element k."""
    k = x.shape[-1]
    squares = torch.nn.functional.pad(x.float().square(), (0, -k % LANES))
    lanes = squares.new_zeros(*x.shape[:-1], LANES)
    for part in squares.split(LANES, dim=-1):
        lanes = lanes + part
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    mean = lanes / float(k) + torch.tensor(eps, dtype=torch.float32)
    gain = 1.0 / mean.double().sqrt().float()  # torch's fp32 square root is not always the nearest one
    return (x.float() * gain * (weight.float().reshape(-1) + offset)).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """fp32 ``gate / (1 + exp(-gate)) * up`` with the kernels' exponential: Cephes' polynomial, one rounding a step."""
    x = (-gate.float()).clamp(-87.0, 88.0)
    n = (x * 1.44269504088896341).round()
    r = x - n * 0.693359375 - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    exponential = p * torch.exp2(n)
    return gate.float() / (1.0 + exponential) * up.float()


def silu_mul_w8a8_linear(
    gate: Tensor,
    up: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """See ``ops.silu_mul_w8a8_linear``."""
    return w8a8_linear(silu_mul(gate, up), b, b_scale, bias, a_scale, out_dtype=out_dtype or gate.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """See ``ops.attention``. Computed in fp64, rounded once."""
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    visible = visible.expand(q.shape[0], q.shape[1], -1, -1)
    if mask is not None:
        visible = visible & mask
    scores = (scale * q.double() @ k.transpose(2, 3)).masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return (p @ v).transpose(1, 2).contiguous().to(q.dtype)
