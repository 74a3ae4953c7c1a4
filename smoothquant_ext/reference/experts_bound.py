"""How far right FP8 experts may lie from exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hadamard import hadamard
from ..scheme import QMAX
from .bounds import EPS
from .norm_activation import ACTIVATIONS
from .quantize import quantize_per_token


class Interval(NamedTuple):
    """fp64 numbers and how far from them the kernels' may be."""

    center: Tensor
    error: Tensor

    def rounded(self, dtype: torch.dtype) -> Interval:
        """After an operation that rounds to a dtype."""
        limits = torch.finfo(dtype)
        size = limits.eps / 2 * (self.center.abs() + self.error)
        return Interval(self.center, self.error + size + limits.smallest_normal * limits.eps)


def fit_tensor_cores(arguments: dict[str, Any]) -> bool:
    """Whether a GPU may multiply on tensor cores, as csrc/cuda/compute/experts_plan.h decides."""
    weight = arguments["weight"]
    is_many = arguments["top_k_index"].numel() > 4 * len(weight[0])
    return is_many and all(each.shape[-1] % 16 == 0 for each in weight)


def experts_bound(arguments: dict[str, Any], on_tensor_cores: bool = False) -> tuple[Tensor, Tensor]:
    """The exact result of ``w8a8_experts``, given its FP8 weights, and the largest error of a right one: fp64 [..., N].

    Exact is everything but the quantization of tokens, whose bits are defined, and of activations. Each step takes the
    error of the one before. What moves most is a quantized activation: near the boundary between two fp8 numbers it may
    become the other one, which ``_requantized`` finds out value by value.

    Args:
        arguments: of the op, by name; plain weights.
        on_tensor_cores: whether products may be computed there.
    """
    x, weight, weight_scale = arguments["x"], arguments["weight"], arguments["weight_scale"]
    experts, index = weight[0].shape[0], arguments["top_k_index"].unsqueeze(0).flatten(0, -2)
    shares = arguments["top_k_weights"].reshape(index.shape).double()
    activation = ACTIVATIONS[arguments.get("activation", "silu")]
    x_rotate, down_rotate = arguments.get("rotate") or (0, 0)
    q, scale = quantize_per_token(x.reshape(-1, x.shape[-1]), weight[0].dtype, rotate=x_rotate)
    a = Interval(q.float().double() * scale.double()[:, None], torch.zeros(q.shape, dtype=torch.double))
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
        hidden = _requantized(_rotated(_activated(activation, *first), down_rotate), weight[-1].dtype)
        out, share = layer(hidden, len(weight) - 1, expert, torch.float32), shares[token, slot, None]
        y_center.index_add_(0, token, share * out.center)
        y_error.index_add_(0, token, share.abs() * out.error)
        magnitude.index_add_(0, token, share.abs() * (out.center.abs() + out.error))
    sums = Interval(y_center, y_error + (index.shape[1] + 1) * EPS * magnitude).rounded(x.dtype)
    shape = (*x.shape[:-1], y_center.shape[1])
    return sums.center.reshape(shape), sums.error.reshape(shape)


def _product(a: Interval, weight: Tensor, scale: Tensor, bias: Tensor | None, on_tensor_cores: bool) -> Interval:
    """See ``gemm_bound``; what tensor cores cut is bounded product by product."""
    wide = weight.float().double() * scale.double().reshape(-1, 1)
    center, error = a.center @ wide.T, a.error @ wide.abs().T
    magnitude = (a.center.abs() + a.error) @ wide.abs().T
    if bias is not None:
        center, magnitude = center + bias.double(), magnitude + bias.double().abs()
    error = error + (weight.shape[-1] + 3) * EPS * magnitude
    return Interval(center, error + _cut(a, wide) if on_tensor_cores else error)


def _cut(a: Interval, weight: Tensor) -> Tensor:
    """What sums of 64 products [M, N, K / 64] lose on tensor cores.

    An instruction cuts 32 products and the sum so far, 33 terms, to 13 bits behind the largest of them; the kernels
    begin anew, in fp32, after two.
    """
    k = weight.shape[-1]
    shape = (-1, (k + 63) // 64, 2, 32)
    rows, off, columns = (torch.nn.functional.pad(each, (0, -k % 64)).reshape(shape) for each in (*a, weight))
    largest = ((rows.abs() + off)[:, None] * columns.abs()).amax(-1)
    first = (rows[:, None, :, 0] * columns[:, :, 0]).sum(-1).abs()
    first = first + (off[:, None, :, 0] * columns[:, :, 0].abs()).sum(-1)
    return 33 * 2.0**-13 * (largest[..., 0] + torch.maximum(largest[..., 1], first)).sum(-1)


def _activated(activation: Callable[[Tensor], Tensor], gate: Interval, up: Interval | None = None) -> Interval:
    """act(gate), or act(gate) * up. No activation is steeper than 1.13 or off by over 8 eps of its input."""
    center = activation(gate.center.float()).double()
    error = 1.13 * (gate.error + EPS * gate.center.abs()) + 16 * EPS * gate.center.abs()
    if up is None:
        return Interval(center, error)
    both = center.abs() * up.error + up.center.abs() * error + error * up.error
    return Interval(center * up.center, both).rounded(torch.float32)


def _rotated(v: Interval, block: int) -> Interval:
    """After the rotation of blocks: log2(block) sums of at most all magnitudes, and a factor, are rounded."""
    matrix = hadamard(block) if block else None
    if matrix is None:
        return v
    shape, root = (*v.center.shape[:-1], v.center.shape[-1] // block, block), math.sqrt(block)
    center = v.center.reshape(shape) @ (matrix.double() / root)
    error, magnitude = (each.reshape(shape).sum(-1, keepdim=True) / root for each in (v.error, v.center.abs()))
    error = error + (math.log2(block) + 3) * EPS * (magnitude + error)
    return Interval(center.reshape(v.center.shape), error.expand(shape).reshape(v.center.shape))


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
