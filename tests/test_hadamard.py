"""Hadamard matrices and the rotations that are made of them."""

from __future__ import annotations

import math

import pytest
import torch

from smoothquant_ext.hadamard import hadamard, rotation

# Orders that a construction here reaches: Sylvester's, Paley's two, and products of them.
KNOWN = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 44, 60, 64, 68, 76, 84, 144, 180, 576, 768, 896]
UNKNOWN = [3, 6, 18, 92, 172]  # 92 and 172 exist, by constructions that are not here


@pytest.mark.parametrize("n", KNOWN)
def test_rows_of_a_hadamard_matrix_are_orthogonal(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert matrix.dtype == torch.int8
    assert set(matrix.unique().tolist()) <= {-1, 1}
    wide = matrix.double()
    assert torch.equal(wide @ wide.t(), n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", UNKNOWN)
def test_an_order_without_a_construction_has_none(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("fixes_ones", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 92, 172])
def test_every_rotation_is_orthogonal(n: int, fixes_ones: bool) -> None:
    matrix = rotation(n, 0, fixes_ones)
    eps = torch.finfo(torch.float64).eps
    assert (matrix @ matrix.t() - torch.eye(n, dtype=torch.float64)).abs().max() <= 8 * n * eps
    if fixes_ones:
        ones = torch.ones(n, dtype=torch.float64)
        assert (ones @ matrix - ones).abs().max() <= 8 * n * eps


def test_a_rotation_spreads_one_channel_evenly_where_a_hadamard_matrix_exists() -> None:
    one = torch.zeros(64, dtype=torch.float64)
    one[5] = 3.0
    assert torch.allclose((one @ rotation(64, 1)).abs(), torch.full((64,), 3 / math.sqrt(64), dtype=torch.float64))


def test_the_seed_decides_the_signs() -> None:
    assert torch.equal(rotation(64, 1), rotation(64, 1))
    assert not torch.equal(rotation(64, 1), rotation(64, 2))
    assert torch.equal(rotation(7, 1), rotation(7, 1))


def test_the_matrix_is_real_whatever_the_default_device() -> None:
    hadamard.cache_clear()
    with torch.device("meta"):
        matrix = hadamard(64)
    assert matrix is not None
    assert matrix.device.type == "cpu"
    assert hadamard(64) is matrix
