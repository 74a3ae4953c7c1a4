"""Sizes and dtypes that the arguments of ops are made for, and what several ops take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from op_testing import randn
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.hadamard import block_size

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Sizes and dtypes that arguments are made for: activations [*leading, k] of ``dtype``, n output features."""

    leading: tuple[int, ...] = (2, 3)
    k: int = 70
    n: int = 9
    dtype: torch.dtype = torch.float32
    eight_bit: torch.dtype = torch.int8
    packs: bool = True
    """Whether some of the weights are packed, which is for the CPU."""

    @property
    def tokens(self) -> int:
        return torch.Size(self.leading).numel()

    @property
    def inner(self) -> int:
        """The width inside an MLP."""
        return self.n + 7

    @property
    def d(self) -> int:
        """The width of a head: one that can be rotated where that of x can be."""
        return 16 if self.k % 16 == 0 else 10

    @property
    def attended(self) -> int:
        """The width of four heads."""
        return 4 * self.d

    def x(self, seed: int = 0) -> Tensor:
        return randn(*self.leading, self.k, seed=seed, dtype=self.dtype) * 3

    def weight(self, *shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """An 8-bit weight and its scales."""
        return reference.quantize_per_token(randn(*shape, seed=seed), self.eight_bit)

    def packed(self, weight: Tensor) -> Tensor:
        return ops.prepack_weight(weight) if self.packs else weight

    def weights(self, *shapes: tuple[int, ...]) -> Arguments:
        """8-bit weights and their scales, as ops of several layers take them; every second one is packed."""
        made = [self.weight(*shape, seed=seed) for seed, shape in enumerate(shapes, start=1)]
        weights = [self.packed(weight) if i % 2 else weight for i, (weight, _) in enumerate(made)]
        return {"weight": weights, "weight_scale": [scale for _, scale in made]}


SCALE = torch.tensor([0.03])


def positive(*shape: int) -> Tensor:
    return randn(*shape, seed=5).abs() + 0.2


def mixed(*sizes: int) -> list[Tensor | None]:
    """A bias of each dtype in turn, and none for every fourth layer."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    return [randn(n, seed=i, dtype=dtypes[i % 4]) if i % 4 < 3 else None for i, n in enumerate(sizes)]


def rotating(
    make: Callable[[Problem], Iterator[Arguments]], *widths: Literal["k", "inner", "attended"]
) -> Callable[[Problem], Iterator[Arguments]]:
    """The same arguments, then the first and the last of them with rows rotated in the largest blocks.

    Of ops with several inputs these are their widths.
    """

    def every(p: Problem) -> Iterator[Arguments]:
        made = list(make(p))
        yield from made
        blocks = [block_size(getattr(p, width)) for width in widths or ("k",)]
        if any(blocks):
            yield from (each | {"rotate": blocks if widths else blocks[0]} for each in (*made[:1], *made[1:][-1:]))

    return every
