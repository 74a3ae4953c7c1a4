"""FP8 products: within a derived bound of the exact result, on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_bounds import check_gemm
from op_testing import (
    FLOAT8,
    FLOATS,
    ISAS,
    assert_same_bits,
    cpu_isa,
    non_contiguous,
    randn,
    random_float8,
    scales,
    threads,
)

from smoothquant_ext import ops, reference


@pytest.mark.parametrize("b_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("a_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 63, 64, 65, 127, 130, 577])
def test_is_within_the_bound_for_every_shape(backend: str, k: int, a_dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    for i, n in enumerate((1, 64, 65, 130)):
        a, b = random_float8(100, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
        a_scale, b_scale = scales(100), scales(n, seed=1)
        packed = ops.prepack_weight(b)
        bias = (None, randn(n), randn(n, dtype=torch.bfloat16), randn(n, dtype=torch.float16))[i % 4]
        for rows in (1, 7, 16, 33, 100):
            # e5m2 times e5m2 overflows fp16.
            out_dtype = (torch.float32, torch.bfloat16)[rows % 2]
            arguments = (a[:rows], b, a_scale[:rows], b_scale, bias)
            y = ops.w8a8_gemm(*(None if t is None else t.to(backend) for t in arguments), out_dtype)
            check_gemm(y, *arguments, (rows, n, k, out_dtype))
            if backend == "cpu":
                assert_same_bits(ops.w8a8_gemm(a[:rows], packed, *arguments[2:], out_dtype), y)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_every_value_is_decoded_exactly(backend: str, rows: int, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    one = torch.ones(1)
    unit = torch.ones(rows, 1).to(dtype)
    y = ops.w8a8_gemm(
        unit.to(backend), every.unsqueeze(1).to(backend), one.to(backend), one.to(backend), None, torch.float32
    )
    expected = every.float().expand(rows, -1)
    assert torch.equal(y.cpu().isnan(), expected.isnan())
    assert torch.equal(y.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    # As the activation, with every k of a tile, times 1 in one column and 0 in the other.
    finite = every.view(torch.uint8)[every.float().isfinite()].view(dtype)
    for position in (0, 1, 2, 3, 64, 131):
        a = torch.zeros(len(finite), 132).to(dtype).view(torch.uint8)
        a[:, position] = finite.view(torch.uint8)
        b = torch.zeros(2, 132)
        b[0, position] = 1
        arguments = (t.to(backend) for t in (a.view(dtype), b.to(dtype), one, one))
        y = ops.w8a8_gemm(*arguments, None, torch.float32).cpu()
        assert torch.equal(y[:, 0], finite.float())
        assert not y[:, 1].any()


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("k", [5, 64, 100])
def test_nan_and_infinity_stay_in_their_row_and_column(backend: str, k: int, dtype: torch.dtype) -> None:
    a, b = random_float8(40, k, dtype=dtype), random_float8(70, k, dtype=dtype, seed=1)
    nan = torch.tensor([torch.nan]).to(dtype).view(torch.uint8)
    a.view(torch.uint8)[3, k // 2] = nan
    b.view(torch.uint8)[66, k - 1] = nan
    one = torch.ones(1)
    y = ops.w8a8_gemm(*(t.to(backend) for t in (a, b, one, one)), None, torch.float32).cpu()
    expected = torch.zeros(40, 70, dtype=torch.bool)
    expected[3] = True
    expected[:, 66] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
def test_linear(backend: str, is_static: bool, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x = randn(50, 300)
    b, b_scale = reference.quantize_per_token(randn(70, 300, seed=1), dtype)
    a_scale = torch.tensor([0.01]) if is_static else None
    bias = randn(70, seed=2)
    for smooth in (None, randn(300, seed=3).abs() + 0.5):
        arguments = (x, b, b_scale, bias, a_scale, smooth)
        y = ops.w8a8_linear(*(None if t is None else t.to(backend) for t in arguments), out_dtype)
        values = x if smooth is None else x / smooth
        if a_scale is None:
            q, scale = reference.quantize_per_token(values, dtype)
        else:
            q, scale = reference.quantize_static(values, a_scale, dtype), a_scale
        check_gemm(y, q, b, scale, b_scale, bias)
        oracle = reference.w8a8_linear(*arguments, out_dtype)
        check_gemm(oracle, q, b, scale, b_scale, bias)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_strange_rows_touch_no_other(backend: str, dtype: torch.dtype) -> None:
    x = randn(40, 130)
    b, b_scale = (t.to(backend) for t in reference.quantize_per_token(randn(70, 130, seed=1), dtype))
    for a_scale in (None, torch.tensor([0.01], device=backend)):
        clean = ops.w8a8_linear(x.to(backend), b, b_scale, input_scale=a_scale)
        strange = x.clone()
        strange[3, 7], strange[17, 129], strange[20] = torch.nan, torch.inf, 0.0
        y = ops.w8a8_linear(strange.to(backend), b, b_scale, input_scale=a_scale)
        assert y[[3, 17]].isnan().all()
        assert not y[20].any()
        untouched = [row for row in range(40) if row not in (3, 17, 20)]
        assert_same_bits(y[untouched], clean[untouched])


def test_no_k_at_all(isa: str) -> None:
    a, b = torch.zeros(40, 0).to(torch.float8_e4m3fn), torch.zeros(70, 0).to(torch.float8_e5m2)
    one, bias = torch.ones(1), randn(70)
    assert not ops.w8a8_gemm(a, b, one, one).any()
    assert_same_bits(ops.w8a8_gemm(a, b, one, one, bias, torch.float32), bias.expand(40, -1))


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_non_contiguous_inputs(isa: str, layout: str) -> None:
    a, b = random_float8(40, 70, dtype=torch.float8_e4m3fn), random_float8(66, 70, dtype=torch.float8_e5m2, seed=1)
    expected = ops.w8a8_gemm(a, b, scales(40), scales(66), None, torch.float32)
    a_there = non_contiguous(a.view(torch.int8))[layout].view(a.dtype)
    b_there = non_contiguous(b.view(torch.int8))[layout].view(b.dtype)
    assert_same_bits(ops.w8a8_gemm(a_there, b_there, scales(40), scales(66), None, torch.float32), expected)


@pytest.mark.parametrize(("rows", "n", "k"), [(3, 577, 577), (300, 577, 577), (385, 70, 2100)])
def test_any_number_of_threads_gives_the_same_bits(isa: str, rows: int, n: int, k: int) -> None:
    # The order of a sum does not depend on how the work is cut; with 385 rows, the last block has one.
    a = random_float8(rows, k, dtype=torch.float8_e4m3fn)
    b = random_float8(n, k, dtype=torch.float8_e4m3fn, seed=1)
    outputs = []
    for count in (1, 2, 3, 7):
        with threads(count):
            outputs.append(ops.w8a8_gemm(a, b, scales(rows), scales(n), None, torch.float32))
    for y in outputs[1:]:
        assert_same_bits(y, outputs[0])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    n=st.integers(1, 200),
    k=st.integers(1, 900),
    dtypes=st.tuples(st.sampled_from(FLOAT8), st.sampled_from(FLOAT8)),
    has_bias=st.booleans(),
    is_packed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_gemm(
    rows: int, n: int, k: int, dtypes: tuple[torch.dtype, torch.dtype], has_bias: bool, is_packed: bool, seed: int
) -> None:
    a, b = random_float8(rows, k, dtype=dtypes[0], seed=seed), random_float8(n, k, dtype=dtypes[1], seed=seed + 1)
    bias = randn(n, seed=seed) if has_bias else None
    weight = ops.prepack_weight(b) if is_packed else b
    for isa in ISAS:
        with cpu_isa(isa):
            y = ops.w8a8_gemm(a, weight, scales(rows), scales(n), bias, torch.float32)
        check_gemm(y, a, b, scales(rows), scales(n), bias, isa)
