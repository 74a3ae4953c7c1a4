"""The bounds that ops keep to whose sums have no defined order: FP8 products, linear and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothquant_ext import reference
from smoothquant_ext.scheme import QMAX

EPS = torch.finfo(torch.float32).eps


def check_gemm(
    y: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, what: object = ""
) -> None:
    """``y`` differs from the exact result by no more than its roundings allow.

    Products of two fp8 values are exact in fp32. Each of K additions, in any order, errs by at most eps / 2 of a
    partial sum, which is at most sum(|a b|); the factor (1 + eps)^K that compounds this is under 2 for K < 2^22. Then
    the product of the scales, the scaling, the bias and the cast round once each.

    The tensor cores of a GPU, which take more than 8 rows of sizes that fit them, are less exact: an instruction adds
    32 products and the sum so far after cutting each to 13 bits behind the largest, and after 4 of them cuBLASLt goes
    on in fp32. 33 terms cut 4 times are off by at most 132 * 2^-13 of the magnitude of the products.
    """
    scale = a_scale.reshape(-1, 1).double() * b_scale.reshape(-1).double()
    wide_a, wide_b = a.float().double(), b.float().double()
    exact = (wide_a @ wide_b.T) * scale
    magnitude = (wide_a.abs() @ wide_b.abs().T) * scale
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    bound = (a.shape[-1] + 3) * EPS * magnitude
    if y.is_cuda and exact.shape[0] > 8 and exact.shape[1] % 8 == a.shape[-1] % 8 == 0:
        bound += 132 * 2.0**-13 * magnitude
    bound += torch.finfo(y.dtype).eps / 2 * (exact.abs() + bound)
    bound += torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
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


def check_attention(y: Tensor, expected: Tensor, arguments: dict[str, Any]) -> None:
    """Roundings may move the result [B, T, H, Dv] of these arguments by as much as this.

    A score, a sum of D products, is off by at most (D + 3) eps times the sum of its magnitudes, its scales included,
    and its exponential by that relatively; fp32 exponentials, sums over S keys and the scales of values by a few eps
    more; a probability that is rounded to bf16, by 2^-9. Every one of these moves the weighted mean of v by its
    relative size times at most 2 max|v|. Then one cast.
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
    score = (q.shape[3] + 5) * EPS * magnitudes.amax((2, 3))  # [B, H]
    relative = score + (k.shape[2] + 16) * EPS + (2**-9 if q.dtype == torch.bfloat16 else 0)
    largest = v.abs().amax((2, 3)).repeat_interleave(group, 1)
    bound = (2 * relative * largest)[:, None, :, None]
    bound = bound + torch.finfo(q.dtype).eps * expected.double().abs() + torch.finfo(q.dtype).tiny
    error = (y.double() - expected.double()).abs()
    assert bool((error <= bound).all()), float(error.max())


class Interval(NamedTuple):
    """fp64 numbers and how far from them the kernels' may be."""

    center: Tensor
    error: Tensor

    def rounded(self, dtype: torch.dtype, steps: int = 1) -> Interval:
        """After ``steps`` operations that round to a dtype."""
        limits = torch.finfo(dtype)
        size = steps * limits.eps / 2 * (self.center.abs() + self.error)
        return Interval(self.center, self.error + size + limits.smallest_normal * limits.eps)


def check_experts(y: Tensor, expected: Tensor, arguments: dict[str, Any]) -> None:
    """FP8 experts differ from exact ones by no more than roundings allow; NaN where the oracle has them.

    Each step takes the error of the one before. What moves most is the quantized activation: a value near the boundary
    between two fp8 numbers may become the other one, which ``_requantized`` finds out value by value.
    """
    x, weight, weight_scale = arguments["x"], arguments["weight"], arguments["weight_scale"]
    experts, index = weight[0].shape[0], arguments["top_k_index"].reshape(-1, arguments["top_k_index"].shape[-1])
    shares = arguments["top_k_weights"].reshape(index.shape).double()
    activation = reference.ACTIVATIONS[arguments.get("activation", "silu")]
    q, scale = reference.quantize_per_token(x.reshape(-1, x.shape[-1]), weight[0].dtype)
    a = Interval(q.float().double() * scale.double()[:, None], torch.zeros(q.shape, dtype=torch.double))
    on_tensor_cores = index.numel() > 4 * experts and all(each.shape[-1] % 16 == 0 for each in weight)
    biases = arguments.get("bias") or [None] * len(weight)

    def layer(values: Interval, i: int, expert: int, dtype: torch.dtype) -> Interval:
        own = None if (given := biases[i]) is None else given.reshape(experts, -1)[expert]
        scales = weight_scale[i].reshape(experts, -1)[expert]
        return _product(values, weight[i][expert], scales, own, on_tensor_cores).rounded(dtype)

    y_center = torch.zeros(len(index), weight[-1].shape[1], dtype=torch.double)
    y_error, magnitude = torch.zeros_like(y_center), torch.zeros_like(y_center)
    for expert in range(experts):
        token, slot = (index == expert).nonzero(as_tuple=True)
        rows = Interval(a.center[token], a.error[token])
        first = [layer(rows, i, expert, x.dtype) for i in range(len(weight) - 1)]
        hidden = _requantized(_activated(activation, *first), weight[-1].dtype)
        out, share = layer(hidden, len(weight) - 1, expert, torch.float32), shares[token, slot, None]
        y_center.index_add_(0, token, share * out.center)
        y_error.index_add_(0, token, share.abs() * out.error)
        magnitude.index_add_(0, token, share.abs() * (out.center.abs() + out.error))
    sums = Interval(y_center, y_error + (index.shape[1] + 1) * EPS * magnitude).rounded(y.dtype)
    flat, nan = y.reshape(y_center.shape).double(), expected.reshape(y_center.shape).isnan()
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    assert torch.equal(flat.isnan(), nan)
    outside = (flat - sums.center).abs() > sums.error
    assert not (outside & ~nan).any(), (flat - sums.center)[outside & ~nan]


def _product(a: Interval, weight: Tensor, scale: Tensor, bias: Tensor | None, on_tensor_cores: bool) -> Interval:
    """See ``check_gemm``."""
    wide = weight.float().double() * scale.double().reshape(-1, 1)
    center, error = a.center @ wide.T, a.error @ wide.abs().T
    magnitude = (a.center.abs() + a.error) @ wide.abs().T
    if bias is not None:
        center, magnitude = center + bias.double(), magnitude + bias.double().abs()
    relative = (weight.shape[-1] + 3) * EPS + (132 * 2.0**-13 if on_tensor_cores else 0)
    return Interval(center, error + relative * magnitude)


def _activated(activation: Callable[[Tensor], Tensor], gate: Interval, up: Interval | None = None) -> Interval:
    """act(gate), or act(gate) * up. No activation is steeper than 1.13 or off by over 8 eps of its input."""
    center = activation(gate.center.float()).double()
    error = 1.13 * (gate.error + EPS * gate.center.abs()) + 16 * EPS * gate.center.abs()
    if up is None:
        return Interval(center, error)
    both = center.abs() * up.error + up.center.abs() * error + error * up.error
    return Interval(center * up.center, both).rounded(torch.float32)


def _requantized(v: Interval, dtype: torch.dtype) -> Interval:
    """After quantization with a scale per row."""
    most = QMAX[dtype]
    absmax, off = (each.amax(-1, keepdim=True) for each in (v.center.abs(), v.error))
    smallest = (absmax - off).clamp(min=torch.finfo(torch.float32).tiny)
    ratio = v.center / absmax.clamp(min=torch.finfo(torch.float32).tiny) * most
    error = (v.error / smallest + v.center.abs() * off / (smallest * smallest)) * most + 3 * EPS * ratio.abs()
    low, q, high = (
        each.clamp(-most, most).float().to(dtype).float().double() for each in (ratio - error, ratio, ratio + error)
    )
    scale = absmax / most
    moved = torch.maximum(high - q, q - low) * (absmax + off) / most + q.abs() * (off / most + 2 * EPS * scale)
    return Interval(q * scale, moved)
