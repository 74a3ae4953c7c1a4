"""Comparisons up to rounding: what they let pass, what they do not, and what no number is to them."""

from __future__ import annotations

import math

import pytest
import torch

from smoothquant_ext.probing.numerics import outlier_ratio, relative_error, same_elements, same_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("roundings", [1, 4, 16])
def test_elements_may_differ_by_so_many_roundings(dtype: torch.dtype, roundings: int) -> None:
    """Of their size, which is 1 here, and the mean size, 1 as well."""
    expected = torch.ones(8, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for factor, agrees in ((0.0, True), (1.9, True), (2.1, False)):
        actual = expected.clone()
        actual[3] += factor * roundings * eps
        # Compared as fp64, whose own rounding is far less, against the coarser dtype of the two.
        assert same_elements(actual, expected.to(dtype), roundings) == agrees


def test_the_coarser_dtype_counts() -> None:
    wide = torch.tensor([1.0, -1.0])
    assert same_elements(wide.to(torch.bfloat16), wide + 1e-3, 1)
    assert same_elements(wide + 1e-3, wide.to(torch.bfloat16), 1)
    assert not same_elements(wide, wide + 1e-3, 1)


def test_an_element_near_zero_is_measured_by_the_mean() -> None:
    expected = torch.tensor([1.0, -1.0, 0.0, 1.0])
    actual = expected + torch.tensor([0, 0, 1e-7, 0])
    assert same_elements(actual, expected, 2)
    assert not same_elements(actual, expected, 1)


def test_what_never_agrees() -> None:
    x = torch.ones(2, 3)
    assert not same_elements(None, x, 4)
    assert not same_elements(x.T, x, 4)
    assert not same_elements(x, torch.full_like(x, math.nan), 4)
    assert not same_elements(torch.full_like(x, math.nan), x, 4, equal_nan=True)
    assert not same_elements(torch.full_like(x, math.inf), -torch.full_like(x, math.inf), 4)
    assert not same_elements(x.long(), x.long() + 1, 4)
    assert not same_rows(x.T, x, 4)
    assert not same_rows(x.long(), x, 4)
    assert not same_rows(x, torch.full_like(x, math.nan), 4)
    assert not same_rows(torch.full_like(x, math.inf), torch.full_like(x, math.inf), 4)


def test_what_always_agrees() -> None:
    x = torch.tensor([1.0, math.inf, -math.inf])
    assert same_elements(x, x.clone(), 0)
    assert same_elements(x.nan_to_num().long(), x.nan_to_num().long(), 0)
    broken = torch.tensor([1.0, math.nan])
    assert same_elements(broken, broken.clone(), 0, equal_nan=True)
    assert not same_elements(broken, broken.clone(), 0)
    assert same_rows(broken[None], broken[None].clone(), 0)
    assert same_elements(torch.empty(0, 3), torch.empty(0, 3), 0)
    assert same_rows(torch.empty(0, 3), torch.empty(0, 3), 0)


def test_every_row_is_measured_by_its_norm() -> None:
    expected = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    actual = expected.clone()
    actual[1, 0] += 500 * 3 * torch.finfo(torch.float32).eps
    assert same_rows(actual, expected, 4)
    assert not same_rows(actual, expected, 2)
    actual = expected.clone()
    actual[0, 0] += 500 * 3 * torch.finfo(torch.float32).eps  # nothing beside the other row
    assert not same_rows(actual, expected, 4)


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == pytest.approx(5.0)
    assert relative_error(torch.tensor([3.0, math.nan]), expected) == math.inf
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf


def test_outlier_ratio() -> None:
    assert outlier_ratio(torch.tensor([1.0, 8.0, 2.0])) == 4
    assert outlier_ratio(torch.zeros(3)) == 0
