"""The bounds that ops keep to whose sums have no defined order: FP8 products, linear and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoothquant_ext.reference.bounds import gemm_bound
from smoothquant_ext.reference.experts_bound import experts_bound, fit_tensor_cores

EPS = torch.finfo(torch.float32).eps


def check_gemm(
    y: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, what: object = ""
) -> None:
    """``y`` differs from the exact result by no more than ``gemm_bound``.

    The tensor cores of a GPU take more than 8 rows of sizes that fit them.
    """
    on_cores = y.is_cuda and y.shape[-2] > 8 and y.shape[-1] % 8 == a.shape[-1] % 8 == 0
    exact, bound = gemm_bound(a, b, a_scale, b_scale, bias, y.dtype, on_cores)
    worst = ((y.cpu().double() - exact).abs() / bound).amax(dim=-1)  # of each row
    assert not y.isnan().any(), what
    assert float(worst.max()) <= 1, (what, worst)


def check_linear(y: Tensor, expected: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """fp32 sums of K products, and one rounding to bf16; ``expected`` is the exact result, rounded."""
    wide_x, wide_weight = x.double(), weight.double()
    exact, magnitude = wide_x @ wide_weight.T, wide_x.abs() @ wide_weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert torch.equal(expected, exact.to(torch.bfloat16))
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + (x.shape[-1] + 2) * EPS * magnitude
    assert bool(((y.double() - exact).abs() <= 1.01 * bound).all())


def check_attention(y: Tensor, expected: Tensor, arguments: dict[str, Any], rounding: float = 0.0) -> None:
    """Roundings may move the result [B, T, H, Dv] of these arguments by as much as this.

    A score, a sum of D products, is off by at most (D + 3) eps times the sum of its magnitudes, its scales included,
    and its exponential by that relatively; fp32 exponentials, sums over S keys and the scales of values by a few eps
    more; a probability that is rounded to bf16, by 2^-9. Every one of these moves the weighted mean of v by its
    relative size times at most 2 max|v|. Then one cast. ``rounding`` is the relative error of a dtype that
    dequantized keys and values and probabilities are rounded to: it moves scores by that share of their magnitudes,
    and the mean by at most 4 of max|v|.
    """
    q, k, v, scale = arguments["q"], arguments["k"].double(), arguments["v"].double(), arguments["scale"]
    if arguments.get("k_scale") is not None:
        k, v = k * arguments["k_scale"].double().unsqueeze(-1), v * arguments["v_scale"].double().unsqueeze(-1)
    assert (y.dtype, y.shape) == (q.dtype, (q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
    assert y.is_contiguous()
    if not y.numel():
        return
    group = q.shape[1] // k.shape[1]
    magnitudes = scale * q.double().abs() @ k.abs().repeat_interleave(group, 1).transpose(2, 3)
    score = ((q.shape[3] + 5) * EPS + rounding) * magnitudes.amax((2, 3))  # [B, H]
    relative = score + (k.shape[2] + 16) * EPS + (2**-9 if q.dtype == torch.bfloat16 else 0) + 2 * rounding
    largest = v.abs().amax((2, 3)).repeat_interleave(group, 1)
    bound = (2 * relative * largest)[:, None, :, None]
    bound = bound + torch.finfo(q.dtype).eps * expected.double().abs() + torch.finfo(q.dtype).tiny
    error = (y.double() - expected.double()).abs()
    assert bool((error <= bound).all()), float(error.max())


def check_experts(y: Tensor, expected: Tensor, arguments: dict[str, Any]) -> None:
    """FP8 experts differ from exact ones by no more than ``experts_bound``; NaN where the oracle has it."""
    exact, bound = experts_bound(arguments, fit_tensor_cores(arguments))
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    assert torch.equal(y.isnan(), expected.isnan())
    largest = torch.finfo(y.dtype).max  # what is larger becomes infinite
    error = (y.double().clamp(-largest, largest) - exact.clamp(-largest, largest)).abs()
    outside = (error > bound) & ~y.isnan()
    assert not outside.any(), (error / bound)[outside]
