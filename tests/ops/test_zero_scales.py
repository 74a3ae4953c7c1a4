"""A weight scale of 0: the output is exactly the bias, on every way to multiply, whatever the codes of the row are."""

from __future__ import annotations

import mixtures
import pytest
import torch
from torch import Tensor

from smoothquant_ext import ops
from smoothquant_ext.scheme import QMAX

DTYPES = list(QMAX)
ROWS = (1, 3, 17, 64)  # of x: decoding, odd, several blocks


def layer(dtype: torch.dtype, n: int, k: int, is_zero: bool) -> tuple[Tensor, Tensor]:
    """A weight and scales [n, 1], every third of them 0; with ``is_zero`` so are these rows."""
    generator = torch.Generator().manual_seed(n + k)
    weight = (torch.rand(n, k, generator=generator) * 2 - 1) * QMAX[dtype]
    scale = torch.rand(n, 1, generator=generator) + 0.5
    scale[::3] = 0.0
    if is_zero:
        weight[::3] = 0.0
    return weight.to(dtype), scale


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("is_zero", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype, is_zero: bool, packed: bool) -> None:
    for n, k in ((7, 5), (64, 96), (33, 200)):
        weight, scale = layer(dtype, n, k, is_zero)
        bias = torch.randn(n)
        w = ops.prepack_weight(weight) if packed else weight
        for m in ROWS:
            x = torch.randn(m, k) * 100
            for input_scale in (None, torch.tensor([0.7])):
                y = ops.w8a8_linear(x, w, scale, bias, input_scale)
                assert torch.equal(y[:, ::3], bias[::3].expand(m, -1))
                assert bool(y.isfinite().all())
                without = ops.w8a8_linear(x, w, scale, None, input_scale)
                assert torch.equal(without[:, ::3], torch.zeros_like(without[:, ::3]))
            outputs = ops.w8a8_linear_group(x, [w, w], [scale, scale], [bias, None])
            assert torch.equal(outputs[0][:, ::3], bias[::3].expand(m, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(dtype: torch.dtype) -> None:
    weight, scale = layer(dtype, 48, 64, is_zero=False)
    bias = torch.randn(48)
    a, a_scale = ops.quantize_per_token(torch.randn(5, 64) * 1e30, dtype)
    y = ops.w8a8_gemm(a, weight, a_scale, scale, bias, torch.float32)
    assert torch.equal(y[:, ::3], bias[::3].expand(5, -1))
    whole = ops.w8a8_gemm(a, weight, a_scale, torch.zeros(1), bias, torch.float32)
    assert torch.equal(whole, bias.expand(5, -1))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts(scheme: str, tokens: int) -> None:
    experts = mixtures.made(scheme, bias="_bias")
    x = torch.randn(tokens, mixtures.K)
    index, weights = mixtures.chosen(tokens)
    experts._buffers["down_scale"].zero_()  # type: ignore[union-attr]
    bias = experts._buffers["down_bias"]
    assert bias is not None
    expected = torch.zeros(tokens, mixtures.N)
    for slot in range(index.shape[1]):  # in fp32, slot by slot, as the op says
        expected = expected + weights[:, slot, None] * bias[index[:, slot]]
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    plain = mixtures.made(scheme)
    plain._buffers["gate_scale"].zero_()  # type: ignore[union-attr]
    assert torch.equal(plain(x, index, weights), torch.zeros(tokens, mixtures.N))  # silu(0) * up = 0
