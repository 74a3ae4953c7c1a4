"""How far a right result may lie from the exact one where the order of sums is not defined."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def gemm_bound(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    on_tensor_cores: bool = False,
) -> tuple[Tensor, Tensor]:
    """The exact result of ``w8a8_gemm`` and the largest error of a right one, both fp64 [M, N]; for FP8.

    Products of two fp8 values are exact in fp32. Each of K additions, in any order, errs by at most eps / 2 of a
    partial sum, which is at most sum(|a b|); the factor (1 + eps)^K that compounds this is under 2 for K < 2^22. Then
    the product of the scales, the scaling, the bias and the cast round once each.

    The tensor cores of a GPU are less exact: an instruction adds 32 products and the sum so far after cutting each to
    13 bits behind the largest, and after 4 of them the kernels go on in fp32. 33 terms cut 4 times are off by at most
    132 * 2^-13 of the magnitude of the products.
    """
    scale = a_scale.reshape(-1, 1).double() * b_scale.reshape(-1).double()
    wide_a, wide_b = a.float().double(), b.float().double()
    exact = (wide_a @ wide_b.T) * scale
    magnitude = (wide_a.abs() @ wide_b.abs().T) * scale
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    bound = (a.shape[-1] + 3) * EPS * magnitude
    if on_tensor_cores:
        bound += 132 * 2.0**-13 * magnitude
    out = torch.finfo(out_dtype)
    return exact, bound + out.eps / 2 * (exact.abs() + bound) + out.smallest_normal * out.eps
