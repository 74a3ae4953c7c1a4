"""Rounds weights to 8 bits: to nearest, with the best clipping of each channel, or by GPTQ.

All three return an 8-bit weight [N, K] and its scales; they differ in the error of the layer's output. The latter two
use the inputs of the layer, through ``hessian = sum over tokens of x x^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import QMAX, SMALLEST_SCALE, Scheme
from .convert import quantize_weight
from .recipe import Rounding

CLIP_RATIOS = tuple(1 - step / 50 for step in range(11))  # of the absmax, down to 0.8: 8 bits want little clipping
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
COLUMNS = 128  # rounded one by one before the columns after them are updated at once


def round_weight(weight: Tensor, scheme: Scheme, method: Rounding, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantizes a weight.

    Args:
        weight: floating point [N, K].
        scheme: its dtype and granularity.
        method: ``"nearest"``; ``"clip"``: to nearest, with scales that minimize the squared error of the layer's output
            as far as inputs are uncorrelated; ``"gptq"``: with the same scales, each column's error is made up for in
            the columns after it (Frantar et al. 2022, algorithm 1).
        hessian: fp32 [K, K], sum of ``x x^T`` over the layer's inputs; without it, or where it overflowed, weights are
            rounded to nearest.

    Returns:
        8-bit [N, K], and fp32 [N, 1] (per channel) or [1] (per tensor).
    """
    if method == "nearest" or hessian is None or not torch.isfinite(2 * hessian.diagonal().sum()):
        return quantize_weight(weight, scheme)
    wide = weight.float()
    scale = clipped_scale(wide, hessian.diagonal(), scheme)
    steps = wide / scale
    steps = gptq(steps, hessian, scheme.dtype) if method == "gptq" else nearest_step(steps, scheme.dtype)
    return steps.to(scheme.dtype), scale


def clipped_scale(weight: Tensor, importance: Tensor, scheme: Scheme) -> Tensor:
    """The scale, fp32 [N, 1] or [1], that minimizes ``sum_k importance[k] * (w[n, k] - q[n, k] * scale)^2``."""
    per_channel = scheme.weight == "channel"
    absmax = weight.abs().amax(dim=1, keepdim=True) if per_channel else weight.abs().amax().reshape(1)
    full = absmax / QMAX[scheme.dtype]
    full = torch.where(full * CLIP_RATIOS[-1] >= SMALLEST_SCALE, full, 1.0)
    best, least = full, torch.full_like(full, torch.inf)
    for ratio in CLIP_RATIOS:
        scale = full * ratio
        errors = ((nearest_step(weight / scale, scheme.dtype) * scale - weight).square() * importance).sum(1)
        error = errors[:, None] if per_channel else errors.sum().reshape(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def gptq(steps: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds ``steps`` [N, K] to values of an 8-bit dtype, column by column, the most used inputs first."""
    order = hessian.diagonal().argsort(descending=True)
    factor = _inverse_factor(hessian[order][:, order])
    columns = steps.t()[order].contiguous()  # [K, N]: a column of the weight is a row here
    rounded = torch.empty_like(columns)
    for start in range(0, len(columns), COLUMNS):
        stop = min(start + COLUMNS, len(columns))
        block = columns[start:stop]
        errors = torch.empty_like(block)
        for i, row in enumerate(factor[start:stop, start:stop]):
            rounded[start + i] = nearest_step(block[i], dtype)
            errors[i] = (block[i] - rounded[start + i]) / row[i]
            block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return rounded[order.argsort()].t().contiguous()


def nearest_step(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of an 8-bit dtype that are nearest to ``steps``, saturating, in the dtype of ``steps``."""
    steps = steps.clamp(-QMAX[dtype], QMAX[dtype])
    return steps.round() if dtype == torch.int8 else steps.to(dtype).to(steps.dtype)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular [K, K], U^T U = (hessian + damping)^-1; more damping where that is needed to invert it."""
    diagonal = hessian.diagonal()
    damping = DAMPING * float(diagonal.mean()) or 1.0
    while True:
        damped = hessian + damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
