"""The bound that FP8 products keep to."""

from __future__ import annotations

import torch
from torch import Tensor

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
