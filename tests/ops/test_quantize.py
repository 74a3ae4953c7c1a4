"""quantize_per_token and quantize_static, bit for bit against the oracle on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import EIGHT_BIT, FLOATS, ISAS, assert_same_bits, cpu_isa, randn
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.scheme import QMAX

ROWS = (0, 1, 2, 5, 17)
WIDTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 577)


def check_per_token(x: Tensor, dtype: torch.dtype, device: str, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q, scale = ops.quantize_per_token(x.to(device), dtype, None if smooth is None else smooth.to(device))
    expected_q, expected_scale = reference.quantize_per_token(x, dtype, smooth)
    assert_same_bits(q, expected_q, (x.shape, x.dtype, dtype))
    assert_same_bits(scale, expected_scale, (x.shape, x.dtype, dtype))
    return q.cpu(), scale.cpu()


def check_static(x: Tensor, scale: float, dtype: torch.dtype, device: str) -> Tensor:
    scale_tensor = torch.tensor([scale])
    q = ops.quantize_static(x.to(device), scale_tensor.to(device), dtype)
    assert_same_bits(q, reference.quantize_static(x, scale_tensor, dtype), (x.shape, x.dtype, dtype, scale))
    return q.cpu()


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_equals_the_oracle_for_every_shape(backend: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x = randn(max(ROWS), width, dtype=x_dtype, seed=width)
        smooth = randn(width, seed=1).abs() + 0.1
        for rows in ROWS:
            check_per_token(x[:rows], dtype, backend)
            check_per_token(x[:rows], dtype, backend, smooth)
            check_static(x[:rows], 0.013, dtype, backend)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (2, 0, 5), (3, 0), (0,), (1, 1, 1, 70)], ids=str)
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    q, scale = check_per_token(randn(*shape), torch.int8, backend)
    assert q.shape == shape
    assert scale.shape == shape[:-1]
    check_static(randn(*shape), 0.1, torch.int8, backend)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_any_magnitude(backend: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for magnitude in (1e-45, 1e-42, 3e-39, 1e-20, 1.0, 6e4, 1e20, 3e38):
        x = (randn(9, 130).double() * magnitude).to(x_dtype)
        check_per_token(x, dtype, backend)
        check_per_token(x, dtype, backend, randn(130, seed=1).abs() * 1e-3 + 1e-4)
        for scale in (1e-45, 1e-38, 0.5 * magnitude, 0.01, 3e38):
            if torch.tensor(scale).isfinite() and torch.tensor(scale) > 0:
                check_static(x, scale, dtype, backend)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value(backend: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(x_dtype)
    for scale in (1.0, 2.0**-9, 3.0e-5):
        check_static(every, scale, dtype, backend)
    # As rows of their own: each is its own absmax, so that q is +-qmax, unless qmax / absmax overflows.
    q, _ = check_per_token(every.unsqueeze(1), dtype, backend)
    normal = every.float().isfinite() & (every.float().abs() > QMAX[dtype] / torch.finfo(torch.float32).max)
    assert set(q.float().abs()[normal].unique().tolist()) == {QMAX[dtype]}


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_ties_round_to_even(backend: str, dtype: torch.dtype) -> None:
    # Between each two neighbours of the 8-bit type, the middle and the fp32 values next to it.
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite() & (values.abs() <= QMAX[dtype])].unique()
    middle = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    x = torch.cat([values, middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    q = check_static(x, 1.0, dtype, backend)
    assert torch.equal(q[: len(values)].float(), values)
    if dtype == torch.int8:
        assert not (q[len(values) : len(values) + len(middle)] % 2).any()


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 17, 130])
def test_strange_rows_touch_no_other(backend: str, width: int, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = randn(9, width, dtype=x_dtype)
    clean_q, clean_scale = ops.quantize_per_token(x, dtype)
    x[1] = 0
    x[2, width // 2] = torch.nan
    x[3, -1] = torch.inf
    x[4, 0] = -torch.inf
    x[5] = -0.0
    for last in range(width):  # wherever it is
        x[6] = 1.0
        x[6, last] = torch.nan
        q, scale = check_per_token(x, dtype, backend)
        assert scale[[2, 3, 4, 6]].isnan().all()
    assert scale[[1, 5]].tolist() == [1.0, 1.0]
    assert not q[[1, 2, 3, 4, 5, 6]].float().any()
    for untouched in (0, 7, 8):
        assert_same_bits(q[untouched], clean_q[untouched])
        assert_same_bits(scale[untouched], clean_scale[untouched])


def test_smooth_that_makes_a_row_overflow_marks_it(backend: str) -> None:
    x = torch.ones(2, 70) * torch.tensor([[1.0], [1e38]])
    smooth = torch.ones(70)
    smooth[5] = 1e-3
    _, scale = check_per_token(x, torch.int8, backend, smooth)
    assert scale.isnan().tolist() == [False, True]


def test_static_nan_and_infinity(backend: str) -> None:
    x = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
    assert check_static(x, 0.5, torch.int8, backend).tolist() == [0, 0, 127, -127, 127, -127]
    q = check_static(x, 0.5, torch.float8_e4m3fn, backend).float()
    assert q[:2].isnan().all()
    assert q[2:].tolist() == [448, -448, 448, -448]
    q = check_static(x, 0.5, torch.float8_e5m2, backend).float()
    assert q[:2].isnan().all()
    assert q[2:].tolist() == [57344, -57344, 57344, -57344]


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_round_trip_is_within_half_a_step(backend: str, dtype: torch.dtype) -> None:
    x = randn(64, 300, seed=3)
    q, scale = (t.cpu() for t in ops.quantize_per_token(x.to(backend), dtype))
    # INT8: half a step of the grid. fp8: half a unit of the last place (2^-4, 2^-3), or half the smallest subnormal.
    relative, absolute = {
        torch.int8: (0.0, 0.5),
        torch.float8_e4m3fn: (2.0**-4, 2.0**-10),
        torch.float8_e5m2: (2.0**-3, 2.0**-17),
    }[dtype]
    # x / scale itself is rounded a few times in fp32.
    bound = relative * x.abs() + scale[:, None] * (absolute + QMAX[dtype] * 4 * torch.finfo(torch.float32).eps)
    error = (q.float() * scale[:, None] - x).abs()
    assert bool((error / bound).amax(dim=1).max() <= 1)


def test_one_row_for_all(backend: str) -> None:
    expanded = randn(6, 5, 70)[:1, :1].to(backend).expand(4, 3, 70)  # through strides of 0
    for actual, expected in zip(
        ops.quantize_per_token(expanded, torch.int8),
        ops.quantize_per_token(expanded.contiguous(), torch.int8),
        strict=True,
    ):
        assert_same_bits(actual, expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    width=st.integers(0, 200),
    exponent=st.integers(-44, 37),
    x_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(EIGHT_BIT),
    special=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 199), st.sampled_from([0.0, torch.nan, torch.inf]))),
    seed=st.integers(0, 2**20),
)
def test_any_input(
    rows: int,
    width: int,
    exponent: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    special: list[tuple[int, int, float]],
    seed: int,
) -> None:
    x = (randn(rows, width, seed=seed).double() * 10.0**exponent).to(x_dtype)
    for row, column, value in special:
        if row < rows and column < width:
            x[row, column] = value
    for isa in ISAS:
        with cpu_isa(isa):
            check_per_token(x, dtype, "cpu")
            check_static(x, 0.37, dtype, "cpu")
