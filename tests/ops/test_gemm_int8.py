"""The INT8 product, w8a8_gemm and w8a8_linear, bit for bit against the oracle on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import (
    FLOATS,
    ISAS,
    assert_same_bits,
    cpu_isa,
    non_contiguous,
    randn,
    random_int8,
    run_on,
    scales,
    threads,
)
from torch import Tensor

from smoothquant_ext import ops, reference

MAX_K = 131071
ROWS = (0, 1, 2, 3, 5, 6, 7, 16, 17, 31, 32, 33, 100)
SIZES = (1, 2, 3, 63, 64, 65, 127, 192, 577)


def biases(n: int) -> list[Tensor | None]:
    return [None, *(randn(n, seed=5, dtype=dtype) * 3 for dtype in FLOATS)]


@pytest.mark.parametrize("n", SIZES)
def test_equals_the_oracle_for_every_shape(backend: str, n: int) -> None:
    for k in SIZES:
        a, b = random_int8(max(ROWS), k, seed=n), random_int8(n, k, seed=k)
        a_scale, b_scale = scales(max(ROWS)), scales(n, seed=1)
        packed = ops.prepack_weight(b)
        for i, rows in enumerate(ROWS):
            bias, out_dtype = biases(n)[(i + n) % 4], FLOATS[(i + k) % 3]
            expected = reference.w8a8_gemm(a[:rows], b, a_scale[:rows], b_scale, bias, out_dtype)
            for weight in [b, packed] if backend == "cpu" else [b]:
                arguments = [a[:rows], weight, a_scale[:rows], b_scale, bias]
                arguments = [None if t is None else t.to(backend) for t in arguments]
                assert_same_bits(ops.w8a8_gemm(*arguments, out_dtype), expected, (rows, n, k, out_dtype))


@pytest.mark.parametrize(("rows", "n", "k"), [(7, 70, 130), (40, 130, 70), (300, 33, 900)])
def test_every_kind_of_scale_bias_and_output(backend: str, rows: int, n: int, k: int) -> None:
    a, b = random_int8(rows, k), random_int8(n, k, seed=1)
    a_scales = (scales(1), scales(1).reshape(()), scales(rows), scales(rows).reshape(rows, 1))
    b_scales = (scales(1), scales(n), scales(n).reshape(n, 1))
    for a_scale, b_scale, bias, out_dtype in itertools.product(a_scales, b_scales, biases(n), FLOATS):
        arguments = (a, b, a_scale, b_scale, bias, out_dtype)
        assert_same_bits(run_on(backend, ops.w8a8_gemm, *arguments), reference.w8a8_gemm(*arguments))


def test_output_dtype_defaults_to_bfloat16(backend: str) -> None:
    a, b, scale = random_int8(3, 5).to(backend), random_int8(4, 5).to(backend), scales(1).to(backend)
    assert ops.w8a8_gemm(a, b, scale, scale).dtype == torch.bfloat16
    assert torch.ops.sq.w8a8_gemm(a, b, scale, scale).dtype == torch.bfloat16


@pytest.mark.parametrize("k", [MAX_K, MAX_K - 1, 4096, 4097, 8192 + 64, 11008])
def test_sums_are_exact_at_their_largest(backend: str, k: int) -> None:
    a = torch.full((33, k), 127, dtype=torch.int8)
    a[1::2] = -127
    a[2, ::2] = -127
    b = torch.full((5, k), 127, dtype=torch.int8)
    b[1] = -127
    b[2, : k // 2] = -127
    b[3] = random_int8(k)
    one = torch.ones(1)
    expected = reference.w8a8_gemm(a, b, one, one, out_dtype=torch.float32)
    assert expected[0, 0] == float(127 * 127 * k)
    for rows in (1, 2, 7, 33):
        y = ops.w8a8_gemm(
            a[:rows].to(backend), b.to(backend), one.to(backend), one.to(backend), out_dtype=torch.float32
        )
        assert_same_bits(y, expected[:rows])


@pytest.mark.parametrize("k", [300, MAX_K])
def test_minus_128_is_multiplied_too(backend: str, k: int) -> None:
    """Up to the largest K, of which 128 * 128 * K is less than 2^31."""
    a, b, one = torch.full((20, k), -128).to(torch.int8), torch.full((7, k), -128).to(torch.int8), torch.ones(1)
    b[1] = 127
    y = ops.w8a8_gemm(a.to(backend), b.to(backend), one.to(backend), one.to(backend), out_dtype=torch.float32)
    assert torch.equal(y.cpu(), reference.w8a8_gemm(a, b, one, one, out_dtype=torch.float32))
    assert float(y[0, 0]) == float(torch.tensor(128 * 128 * k, dtype=torch.float32))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_the_last_cast_of_any_value(backend: str, rows: int, out_dtype: torch.dtype) -> None:
    # Sums of 1 times scales with random bits: every exponent, subnormals, infinities and NaNs.
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = [65504.0, 65519.996, 65520.0, 6e-8, 2.98e-8, 3.3895e38, 3.4e38, 1e-45, 9.2e-41, 4.6e-41, 1.17549435e-38]
    values = torch.cat([bits.view(torch.float32), torch.tensor(edges), -torch.tensor(edges)])
    values[100:200] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).repeat(20)
    a, b = torch.ones(rows, 1, dtype=torch.int8), torch.ones(len(values), 1, dtype=torch.int8)
    one = torch.ones(1, device=backend)
    for sign in (1, -1):
        y = ops.w8a8_gemm(a.to(backend) * sign, b.to(backend), one, values.to(backend), out_dtype=out_dtype)
        assert_same_bits(y, (values * sign).to(out_dtype).expand(rows, -1))


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_subnormal_outputs_are_not_flushed(backend: str, rows: int, out_dtype: torch.dtype) -> None:
    # Instructions that convert to bf16 flush subnormals: a panel of 64 columns for every scale and bias near them.
    magnitudes = torch.tensor([2.0**exponent for exponent in (-149, -140, -127, -126, -125, -118, -101, -100, -99)])
    fractions = 1 + torch.arange(64) / 64
    scale = (magnitudes[:, None] * fractions).flatten()
    n = len(scale)
    a = torch.ones(rows, 1, dtype=torch.int8, device=backend)
    one = torch.ones(1, device=backend)
    for value in (1, -1, 0):
        b = torch.full((n, 1), value, dtype=torch.int8)
        expected = scale * value if value else torch.zeros(n)
        y = ops.w8a8_gemm(a, b.to(backend), one, scale.to(backend), None, out_dtype)
        assert_same_bits(y, expected.to(out_dtype).expand(rows, -1))
        for bias in (*magnitudes[:, None] * fractions, torch.zeros(64), -torch.zeros(64)):
            bias = bias.repeat(n // 64)
            y = ops.w8a8_gemm(a, b.to(backend), one, scale.to(backend), bias.to(backend), out_dtype)
            assert_same_bits(y, (expected + bias).to(out_dtype).expand(rows, -1))
            y = ops.w8a8_gemm(a, b.to(backend), one, one, bias.to(backend), out_dtype)
            assert_same_bits(y, (value + bias).to(out_dtype).expand(rows, -1))


@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
@pytest.mark.parametrize("is_smooth", [False, True], ids=["plain", "smooth"])
def test_linear_equals_the_oracle(backend: str, x_dtype: torch.dtype, is_static: bool, is_smooth: bool) -> None:
    for n, k in ((1, 1), (64, 64), (65, 130), (130, 577), (3, 2)):
        x = randn(100, k, dtype=x_dtype, seed=k)
        x[3] = 0
        x[4, k // 2] = torch.nan
        x[30, -1] = -torch.inf
        b, b_scale = reference.quantize_per_token(randn(n, k, seed=1), torch.int8)
        a_scale = torch.tensor([0.02]) if is_static else None
        smooth = randn(k, seed=2).abs() + 0.2 if is_smooth else None
        for i, rows in enumerate((1, 5, 16, 33, 100)):
            bias = biases(n)[(i + n) % 4]
            out_dtype = (None, *FLOATS)[i % 4]
            arguments = (x[:rows], b, b_scale, bias, a_scale, smooth)
            expected = reference.w8a8_linear(*arguments, out_dtype)
            on_device = [None if t is None else t.to(backend) for t in arguments]
            y = ops.w8a8_linear(*on_device, out_dtype)
            assert y.dtype == (out_dtype or x_dtype)
            assert_same_bits(y, expected, (rows, n, k))
            if rows > 30:
                assert y[[4, 30]].isnan().all()
                assert not y[[0, 3, 5, 29, 31]].isnan().any()


def test_a_row_does_not_depend_on_the_others(backend: str) -> None:
    x = randn(100, 130, dtype=torch.bfloat16)
    b, b_scale = (t.to(backend) for t in reference.quantize_per_token(randn(70, 130, seed=1), torch.int8))
    together = ops.w8a8_linear(x.to(backend), b, b_scale)
    for row in (0, 50, 99):
        assert_same_bits(ops.w8a8_linear(x[row : row + 1].to(backend), b, b_scale)[0], together[row])


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (2, 0, 70), (1, 1, 1, 70)], ids=str)
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    b, b_scale = reference.quantize_per_token(randn(9, 70, seed=1), torch.int8)
    y = ops.w8a8_linear(x.to(backend), b.to(backend), b_scale.to(backend))
    assert y.shape == (*shape[:-1], 9)
    assert_same_bits(y, reference.w8a8_linear(x, b, b_scale))
    q, scale = reference.quantize_per_token(x, torch.int8)
    y = ops.w8a8_gemm(q.to(backend), b.to(backend), scale.to(backend), b_scale.to(backend), out_dtype=torch.float32)
    assert_same_bits(y, reference.w8a8_gemm(q, b, scale, b_scale, out_dtype=torch.float32))


@pytest.mark.parametrize("bias", [None, torch.arange(4.0)], ids=["no bias", "bias"])
def test_empty_sizes_do_as_torch_does(backend: str, bias: Tensor | None) -> None:
    bias_there = None if bias is None else bias.to(backend)
    for rows, n, k in ((3, 4, 0), (0, 4, 5), (0, 4, 0), (40, 4, 0)):
        x, b, b_scale = torch.ones(rows, k), torch.ones(n, k, dtype=torch.int8), torch.ones(n, 1)
        y = ops.w8a8_linear(x.to(backend), b.to(backend), b_scale.to(backend), bias_there)
        assert_same_bits(y, torch.nn.functional.linear(x, b.float(), bias))
    x, b, b_scale = torch.ones(3, 5), torch.ones(0, 5, dtype=torch.int8), torch.ones(0, 1)
    assert ops.w8a8_linear(x.to(backend), b.to(backend), b_scale.to(backend)).shape == (3, 0)


def test_non_contiguous_inputs(isa: str) -> None:
    a, b, a_scale, b_scale, bias = random_int8(40, 70), random_int8(66, 70, seed=1), scales(40), scales(66), randn(66)
    expected = reference.w8a8_gemm(a, b, a_scale, b_scale, bias, torch.float32)
    for layout in ("strided", "transposed", "offset"):
        a_there, b_there = non_contiguous(a)[layout], non_contiguous(b)[layout]
        y = ops.w8a8_gemm(a_there, b_there, a_scale, b_scale, bias, torch.float32)
        assert_same_bits(y, expected, layout)
        assert_same_bits(ops.prepack_weight(b_there), reference.prepack_weight(b), layout)
        x = randn(40, 70)
        y = ops.w8a8_linear(non_contiguous(x)[layout], b, b_scale, bias)
        assert_same_bits(y, ops.w8a8_linear(x, b, b_scale, bias), layout)
    every_second = {"a": a_scale, "b": b_scale, "bias": bias}
    strided = {name: t.repeat_interleave(2)[::2] for name, t in every_second.items()}
    y = ops.w8a8_gemm(a, b, strided["a"], strided["b"], strided["bias"], torch.float32)
    assert_same_bits(y, expected)
    constant = torch.tensor([0.5]).expand(66)  # stride 0, N elements
    y = ops.w8a8_gemm(a, b, a_scale, constant, None, torch.float32)
    assert_same_bits(y, reference.w8a8_gemm(a, b, a_scale, torch.full((66,), 0.5), None, torch.float32))
    packed = non_contiguous(ops.prepack_weight(b))["strided"]
    assert_same_bits(ops.w8a8_gemm(a, packed, a_scale, b_scale, bias, torch.float32), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 3000, 700), (300, 577, 577), (1100, 70, 900), (300, 70, 4200)])
def test_any_number_of_threads_gives_the_same_bits(isa: str, rows: int, n: int, k: int, count: int) -> None:
    x, b = randn(rows, k), random_int8(n, k)
    b_scale = scales(n)
    with threads(count):
        packed = ops.prepack_weight(b)
        y = ops.w8a8_linear(x, packed, b_scale)
        unpacked = ops.w8a8_linear(x, b, b_scale)
    assert_same_bits(packed, reference.prepack_weight(b))
    assert_same_bits(y, reference.w8a8_linear(x, b, b_scale))
    assert_same_bits(unpacked, y)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 300), st.integers(1, 200), st.integers(1, 1300)),
    x_dtype=st.sampled_from(FLOATS),
    out_dtype=st.sampled_from([None, *FLOATS]),
    is_static=st.booleans(),
    has_bias=st.booleans(),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_linear(
    shape: tuple[int, int, int],
    x_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    is_static: bool,
    has_bias: bool,
    is_packed: bool,
    seed: int,
) -> None:
    rows, n, k = shape
    x, b = randn(rows, k, dtype=x_dtype, seed=seed), random_int8(n, k, seed=seed)
    bias = randn(n, seed=seed) if has_bias else None
    a_scale = torch.tensor([0.03]) if is_static else None
    b_scale = scales(n, seed=seed)
    expected = reference.w8a8_linear(x, b, b_scale, bias, a_scale, None, out_dtype)
    weight = ops.prepack_weight(b) if is_packed else b
    for isa in ISAS:
        with cpu_isa(isa):
            y = ops.w8a8_linear(x, weight, b_scale, bias, a_scale, None, out_dtype)
        assert_same_bits(y, expected, isa)
