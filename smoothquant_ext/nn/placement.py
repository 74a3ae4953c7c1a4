"""Where our ops run, and how the layers of a group lie in a GPU's memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED_ROWS = 16
"""Rows of a weight in multiples of this keep the ones behind it where kernels and cuBLASLt want them: at 16 bytes."""


def has_ops(x: Tensor) -> bool:
    """Whether our ops run where a tensor lies. A module asks at every call, since its model may have been moved."""
    return x.is_cpu or x.is_cuda


def are_joined(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie one after the other in one storage."""
    return all(
        one.is_contiguous()
        and other.is_contiguous()
        and one.data_ptr() + one.nbytes == other.data_ptr()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        for one, other in itertools.pairwise(tensors)
    )


def joined(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same tensors [N, ...], as slices of one [sum of N, ...]."""
    if are_joined(tensors):
        return tensors
    dtype = tensors[0].dtype
    plain = torch.uint8 if dtype.itemsize == 1 else dtype  # torch does not concatenate every 8-bit dtype everywhere
    whole = torch.cat([tensor.view(plain) for tensor in tensors]).view(dtype)
    parts: Sequence[Tensor] = whole.split([len(tensor) for tensor in tensors])
    return parts
