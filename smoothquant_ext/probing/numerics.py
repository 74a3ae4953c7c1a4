"""Comparisons of two computations of the same values: equal up to rounding, relative errors, outliers.

A caller that compares states how many roundings lie between the two computations, and why.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # keeps a quotient finite where the divisor is 0


def same_elements(actual: Tensor | None, expected: Tensor, roundings: int, equal_nan: bool = False) -> bool:
    """Whether two tensors agree element by element up to so many roundings of the coarser of their dtypes.

    An element may differ by ``roundings * eps`` times its size plus the mean size: elements are sums, whose terms may
    be larger than they are. Integers have to be equal.

    Args:
        actual: any shape; ``None``, or a shape other than the expected one, does not agree.
        expected: any shape.
        roundings: of each element, between the two computations.
        equal_nan: whether a NaN agrees with a NaN.
    """
    if actual is None or actual.shape != expected.shape:
        return False
    if not (actual.is_floating_point() and expected.is_floating_point()):
        return torch.equal(actual, expected)
    tolerance = roundings * max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = actual.double(), expected.double()
    sizes = expected.abs().where(expected.isfinite(), 0.0)
    same = (actual - expected).abs() <= tolerance * (sizes + sizes.mean())
    if equal_nan:
        same |= actual.isnan() & expected.isnan()
    return bool((same | (actual == expected)).all())  # two infinities are equal, and have no difference


def same_rows(actual: Tensor, expected: Tensor, roundings: int) -> bool:
    """Whether every row [..., K] agrees up to so many roundings of the coarser dtype, in the norm over the row.

    Elements that are NaN in both agree: damaged weights are reported elsewhere.
    """
    if actual.shape != expected.shape or not actual.is_floating_point():
        return False
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = actual.float(), expected.float()
    difference = torch.where(expected.isnan() & actual.isnan(), 0.0, expected - actual).norm(dim=-1)
    errors = difference / expected.nan_to_num().norm(dim=-1).clamp(min=TINY)
    return bool((errors <= roundings * eps).all())  # False for a NaN


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm expected, of whole tensors; infinite where it is no number.

    For integers 0 if they are equal, else infinite.
    """
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else torch.inf
    size = float(expected.double().norm())
    error = float((expected.double() - actual.double()).norm())
    error = error / size if size > 0 else error
    return torch.inf if math.isnan(error) else error


def outlier_ratio(absmax: Tensor) -> float:
    """Largest magnitude over the median one: what a scale that is shared by all has to bridge."""
    return float(absmax.max() / absmax.median().clamp(min=TINY))
