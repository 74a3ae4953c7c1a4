"""The tensors of an 8-bit linear layer, and lists of them as the ops of several layers take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Layer", "as_lists"]


class Layer(NamedTuple):
    """An 8-bit linear layer: what ops call ``weight``, ``weight_scale`` and ``bias``."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None


def as_lists(layers: Iterable[Layer]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """``weight``, ``weight_scale`` and ``bias`` of an op of several layers."""
    weights, scales, biases = map(list, zip(*layers, strict=True))
    return weights, scales, biases
