"""Comparisons of two computations of the same values: equal up to rounding, relative error, outliers."""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings between the two computations: in the dtype of the activations, a cast, a product and another cast.
ROUNDINGS = 4


def agrees(actual: Tensor | None, expected: Tensor) -> bool:
    """Equal within a few roundings of the narrower dtype, element by element."""
    if actual is None or actual.shape != expected.shape:
        return False
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = actual.double(), expected.double()
    return torch.allclose(actual, expected, rtol=ROUNDINGS * eps, atol=ROUNDINGS * eps * float(expected.abs().mean()))


def worst_row_error(expected: Tensor, actual: Tensor) -> float:
    """The largest norm of the difference over the norm expected, of all rows; infinite for other shapes."""
    if expected.shape != actual.shape:
        return float("inf")
    is_damaged = expected.isnan() & actual.isnan()  # of damaged weights others tell
    difference = torch.where(is_damaged, 0.0, expected - actual).norm(dim=-1)
    error = (difference / expected.nan_to_num().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)).max()
    return float(error.nan_to_num(nan=torch.inf))


def outlier_ratio(absmax: Tensor) -> float:
    """Largest channel absmax over the median one: what a per-token or per-tensor scale has to bridge."""
    return float(absmax.max() / absmax.median().clamp(min=torch.finfo(torch.float32).tiny))


def relative_error(expected: Tensor, actual: Tensor) -> float:
    """Norm of the difference over the norm expected; for integers 0 if they are equal, else infinite."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(expected, actual) else float("inf")
    scale = float(expected.double().norm())
    error = float((expected.double() - actual.double()).norm())
    return error / scale if scale > 0 else error
