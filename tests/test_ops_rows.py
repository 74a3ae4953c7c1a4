"""The ops between the products: rms_norm and silu_mul_w8a8_linear, bit for bit against the oracle on every CPU ISA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import EIGHT_BIT, FLOATS, ISAS, cpu_isa
from torch import Tensor

from smoothquant_ext import ops, reference

SHAPES = [(0, 8), (1, 1), (3, 15), (2, 16), (5, 17), (7, 64), (33, 577), (2, 3, 100), (4, 4096)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_isa(request.param):
        yield request.param


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def weight(n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return ops.quantize_per_token(randn(n, k, seed=7), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> None:
    x, w = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    y = ops.rms_norm(x, w, 1e-5, offset)
    assert same(y, reference.rms_norm(x, w, 1e-5, offset))
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * (w.double() + offset)
    # One rounding to the output's dtype, after fp32 sums of K terms.
    bound = (torch.finfo(dtype).eps + shape[-1] * torch.finfo(torch.float32).eps) * exact.abs() + torch.finfo(
        dtype
    ).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 40), k=st.integers(1, 300), seed=st.integers(0, 999), dtype=st.sampled_from(FLOATS))
def test_rms_norm_of_any_shape(rows: int, k: int, seed: int, dtype: torch.dtype) -> None:
    x, w = randn(rows, k, dtype=dtype, seed=seed), randn(k, seed=seed + 1)
    for isa in ISAS:
        torch.ops.sq._set_cpu_isa(isa)
        assert same(ops.rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6))


def test_rms_norm_of_strange_rows() -> None:
    x = randn(6, 70)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 4] = float("inf")
    x[4] = 1e-30
    x[5] = 1e30
    y = ops.rms_norm(x, torch.ones(70), 1e-6)
    assert same(y, reference.rms_norm(x, torch.ones(70), 1e-6))
    assert not y[1].any()
    assert y[2].isnan().all()
    assert same(y[0], ops.rms_norm(x[:1], torch.ones(70), 1e-6)[0])


def test_exponential_is_accurate() -> None:
    gate = torch.linspace(-100, 100, 100_001)
    exact = gate.double() / (1 + torch.exp(-gate.double()))
    error = (reference.silu_mul(gate, torch.ones_like(gate)).double() - exact).abs()
    # 2 ulp of exp, 1 each of the addition and the division; below -87 the exponential saturates, and silu with it.
    assert bool((error <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 100 * 2.0**-125).all())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype, static: bool) -> None:
    gate, up = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    b, b_scale = weight(9, shape[-1], torch.int8)
    a_scale = torch.tensor([0.05]) if static else None
    bias = randn(9, dtype=dtype, seed=2)
    expected = reference.silu_mul_w8a8_linear(gate, up, b, b_scale, bias, a_scale)
    assert same(ops.silu_mul_w8a8_linear(gate, up, b, b_scale, bias, a_scale), expected)
    assert same(ops.silu_mul_w8a8_linear(gate, up, ops.prepack_weight(b), b_scale, bias, a_scale), expected)


@pytest.mark.parametrize("eight_bit", EIGHT_BIT[1:], ids=str)
def test_silu_mul_in_fp8(eight_bit: torch.dtype) -> None:
    gate, up = randn(5, 130), randn(5, 130, seed=1)
    b, b_scale = weight(9, 130, eight_bit)
    expected = reference.silu_mul_w8a8_linear(gate, up, b, b_scale)
    q, scale = reference.quantize_per_token(reference.silu_mul(gate, up), eight_bit)
    magnitude = reference.w8a8_gemm(q.float().abs().to(eight_bit), b.float().abs().to(eight_bit), scale, b_scale)
    bound = 130 * torch.finfo(torch.float32).eps * magnitude.float() + 1e-30
    assert bool(((ops.silu_mul_w8a8_linear(gate, up, b, b_scale) - expected).abs() <= bound).all())


def test_silu_mul_of_strange_rows_touches_no_other() -> None:
    gate, up = randn(6, 70), randn(6, 70, seed=1)
    b, b_scale = weight(9, 70, torch.int8)
    clean = ops.silu_mul_w8a8_linear(gate, up, b, b_scale)
    gate[1, 3], up[2, 4], gate[3, 5] = float("nan"), float("inf"), float("-inf")
    gate[4] = 0
    y = ops.silu_mul_w8a8_linear(gate, up, b, b_scale)
    assert y[[1, 2, 3]].isnan().all()
    assert not y[4].any()
    assert torch.equal(y[[0, 5]], clean[[0, 5]])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    gate, up, x = randn(300, 200), randn(300, 200, seed=1), randn(2000, 200, seed=2)
    b, b_scale = weight(70, 200, torch.int8)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outputs.append((ops.silu_mul_w8a8_linear(gate, up, b, b_scale), ops.rms_norm(x, x[0], 1e-6)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, outputs[0][0]) and torch.equal(n, outputs[0][1]) for y, n in outputs)


def test_non_contiguous_inputs() -> None:
    gate, up = randn(40, 30).t(), randn(30, 80)[:, ::2]
    b, b_scale = weight(9, 40, torch.int8)
    expected = ops.silu_mul_w8a8_linear(gate.contiguous(), up.contiguous(), b, b_scale)
    assert torch.equal(ops.silu_mul_w8a8_linear(gate, up, b, b_scale), expected)
    w = randn(80)[::2]
    assert torch.equal(ops.rms_norm(gate, w, 1e-6), ops.rms_norm(gate.contiguous(), w.contiguous(), 1e-6))


def test_errors_name_the_culprit() -> None:
    b, b_scale = weight(9, 40, torch.int8)
    x = randn(3, 40)
    for call, sentence in (
        (lambda: ops.rms_norm(x, torch.ones(39), 1e-6), "rms_norm: weight has 39 elements, expected K=40"),
        (lambda: ops.rms_norm(x.double(), torch.ones(40), 1e-6), "rms_norm: x is float64"),
        (lambda: ops.rms_norm(x, torch.ones(40).int(), 1e-6), "rms_norm: weight is int32"),
        (lambda: ops.silu_mul_w8a8_linear(x, x.half(), b, b_scale), "gate is float32 and up is float16"),
        (lambda: ops.silu_mul_w8a8_linear(x, x[:2], b, b_scale), r"gate has shape \[3, 40\] and up \[2, 40\]"),
        (lambda: ops.silu_mul_w8a8_linear(x[:, :8], x[:, :8], b, b_scale), "gate has K=8, but b has K=40"),
        (lambda: ops.silu_mul_w8a8_linear(x, x, b, b_scale[:3]), "b_scale has 3 elements, expected 1 or N=9"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            call()


def test_opcheck() -> None:
    b, b_scale = weight(9, 40, torch.int8)
    x = randn(3, 40, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.sq.rms_norm.default, (x, randn(40), 1e-6))
    torch.library.opcheck(torch.ops.sq.silu_mul_w8a8_linear.default, (x, x, b, b_scale))
    torch.library.opcheck(torch.ops.sq.silu_mul_w8a8_linear.default, (x, x, ops.prepack_weight(b), b_scale))
