"""Families of CUDA kernels, each proven as one, and the ways to multiply."""

from __future__ import annotations

import re
from collections.abc import Mapping

DTYPES = ("int8", "fp8")
"""What a product multiplies; ways are proven and ranked for each."""

WAYS = ("library", "library_fast", "skinny", "mma", "wgmma", "torch")
"""The ways to multiply, as SMOOTHQUANT_CUDA_GEMM and csrc/cuda/compute/ways.h name them: cuBLASLt, the same with FP8
sums in fewer bits, few rows without tensor cores, our tensor-core kernels, and torch's own products."""

PRODUCERS = ("quantize", "norm_activation")
"""The families of kernels without a product."""

EXPERTS = ("experts_int8", "experts_fp8")
"""The families of the products of a mixture's experts, which have no other way."""

LAYERS = ("decoder_layer",)
"""The families of kernels between the products of an op: those before the attention of a decoder layer."""

ROW_CLASSES = (1, 8, 16, 64, 512, 0)
"""The ranking of ways is by the rows of the activation: at most so many, and 0 for any more."""

OLDEST = 80
"""The oldest architecture that the kernels are written for."""
OLDEST_FP8 = 89
"""The oldest architecture whose tensor cores multiply fp8."""
WGMMA = 90
"""The architecture that has wgmma."""


def way_of(family: str) -> tuple[str, str] | None:
    """The way and the dtype of a family of products, such as "mma_int8"; ``None`` for the others."""
    way, _, dtype = family.rpartition("_")
    return (way, dtype) if way in WAYS and dtype in DTYPES else None


def families_of(arch: int, archs: str) -> tuple[str, ...]:
    """The families that a GPU of this architecture has instructions for, in a library built for ``archs``."""
    found = [*PRODUCERS, *LAYERS, *EXPERTS]
    for dtype in DTYPES:
        has_cores = dtype == "int8" or arch >= OLDEST_FP8
        has_wgmma = arch == WGMMA and re.search(r"\b90a", archs) is not None
        ways = {
            "library": True,
            "library_fast": dtype == "fp8" and has_cores,
            "skinny": True,
            "mma": has_cores,
            "wgmma": has_wgmma,
        }
        found += [f"{way}_{dtype}" for way, is_there in ways.items() if is_there]
    return tuple(found)


def ways_table(order: Mapping[int, tuple[str, ...]]) -> str:
    """The ranking of one dtype, by classes of rows, as ``torch.ops.sq._set_cuda_ways`` reads it."""
    return ";".join(f"{rows or ''}={','.join(ways)}" for rows, ways in order.items())
