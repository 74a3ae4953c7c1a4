"""The ops of the emulated CUDA device, called with tensors of the CPU, and what their results are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from emulated_cuda import emulated_cuda
from op_testing import assert_same_bits, randn, random_float8, random_int8, scales, threads
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.declare import DECLARED
from smoothquant_ext.reference.bounds import gemm_bound

OPS = [name for name, declaration in DECLARED.items() if declaration.cuda]
ARCHS = (80, 89, 90, 100)


@contextlib.contextmanager
def ops_there() -> Iterator[None]:
    """A CUDA device, and in ``ops`` functions that call the ops there with tensors of the CPU.

    On one thread: the emulation has one, and threads of the oracle would only wait for one another.
    """
    with emulated_cuda(), threads(1), contextlib.ExitStack() as patches:
        for op in OPS:
            patches.enter_context(patch.object(ops, op, partial(run_there, getattr(ops, op))))
        yield


def run_there(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The op on tensors of the emulated device that have the same memory, with its offsets and strides."""
    args, kwargs = moved(torch.ops.emulated_cuda.there, (args, kwargs))
    return moved(torch.ops.emulated_cuda.back, op(*args, **kwargs))


def moved(move: Callable[[Tensor], Tensor], values: Any) -> Any:
    return tree_map_only(Tensor, move, values)


def same(actual: Any, expected: Any, what: object = "") -> None:
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected, what)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other, what)


def int8_product(m: int, n: int, k: int) -> tuple[Any, ...]:
    """Arguments of ``w8a8_gemm``."""
    return (random_int8(m, k), random_int8(n, k, seed=1), scales(m), scales(n), randn(n), torch.bfloat16)


def fp8_product(
    m: int, n: int, k: int, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
    return a, b, scales(m), scales(n, seed=1), randn(n)


def check_fp8(y: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    """K roundings of fp32 sums, four of single operations, and the cast."""
    exact, bound = gemm_bound(a, b, a_scale, b_scale, bias, y.dtype)
    assert bool(((y.double() - exact).abs() <= bound).all())


def weight(n: int, k: int, seed: int = 1, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return reference.quantize_per_token(randn(n, k, seed=seed), dtype)


def lists(*layers: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``weight`` and ``weight_scale`` of several layers."""
    return [w for w, _ in layers], [scale for _, scale in layers]
