"""The layout of weights that ``ops.prepack_weight`` packs for the CPU kernels, the same on every CPU.

Panels of 64 columns of the product follow one another. In panel p, element [k4, n, j] is
``weight[64 p + n, 4 k4 + j]``, zero padded; K is padded to a multiple of 64. One more k4 row behind holds the int32
sums of the columns of an INT8 weight, and zeros for FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 64
"""Columns in one panel of a packed weight, and what K is padded to a multiple of."""


def packed_shape(n: int, k: int) -> tuple[int, int, int, int]:
    """The shape of a weight [n, k] once it is packed. Sizes may be symbolic."""
    return (n + PANEL - 1) // PANEL, (k + PANEL - 1) // PANEL * (PANEL // 4) + 1, PANEL, 4


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features] that ``ops.prepack_weight`` packed."""
    panels, rows4 = packed.shape[0], packed.shape[1] - 1
    plain = packed.view(torch.int8)[:, :rows4].transpose(1, 2).reshape(panels * PANEL, rows4 * 4)
    return plain[:out_features, :in_features].contiguous().view(packed.dtype)


def unpack_rows(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """Rows [..., in_features] of the weight that ``ops.prepack_weight`` packed, of indices [...] that it has."""
    elements = packed.view(torch.int8)[:, :-1]
    plain = elements[rows // PANEL, :, rows % PANEL].flatten(-2)[..., :in_features]
    return plain.contiguous().view(packed.dtype)
