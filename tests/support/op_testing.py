"""What the tests of the ops share: backends, inputs, and comparison bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from smoothquant_ext import ops, reference  # loads the ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BIT = (torch.int8, *FLOAT8)

ISAS = tuple(isa for isa in reversed(ops.cpu_isas()) if not torch.ops.sq.cpu_isa_why_not(isa))
# There is a GPU, and our kernels passed their proof on it: torch's products and norms in their place have other bits.
HAS_CUDA = torch.cuda.is_available() and "rms_norm" not in ops.settle().replaced


@contextmanager
def cpu_isa(isa: str) -> Iterator[None]:
    """Runs the CPU ops on this instruction set."""
    before = ops.cpu_isa()
    torch.ops.sq._set_cpu_isa(isa)
    try:
        yield
    finally:
        torch.ops.sq._set_cpu_isa(before)


def backends() -> Iterator[str]:
    """The device of every backend in turn, the CPU's with each of its instruction sets in use."""
    for isa in ISAS:
        with cpu_isa(isa):
            yield "cpu"
    if HAS_CUDA:
        yield "cuda"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs torch's CPU ops on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(count: int, seed: int = 0) -> Tensor:
    """fp32 [count], all positive."""
    return randn(count, seed=seed).abs() * 0.01 + 1e-4


def random_int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def random_float8(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Every finite value of the dtype is equally likely, subnormals and both zeros included."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.view(torch.uint8)[every.float().isfinite()]
    return finite[torch.randint(len(finite), shape, generator=torch.Generator().manual_seed(seed))].view(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Same dtype, shape and bits, signs of zeros included; a NaN equals any NaN."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    actual, expected = actual.cpu(), expected.cpu()
    if actual.dtype == torch.int8:
        assert torch.equal(actual, expected), what
        return
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nan), what
    assert torch.equal(actual.view(bits)[~nan], expected.view(bits)[~nan]), what


def non_contiguous(x: Tensor) -> dict[str, Tensor]:
    """The same values, laid out in other ways."""
    every_second = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    every_second[..., ::2] = x
    rows = x.reshape(-1, x.shape[-1])
    offset = torch.empty(rows.shape[0] + 1, x.shape[-1] + 3, dtype=x.dtype)
    offset[1:, 3:] = rows
    return {
        "strided": every_second[..., ::2],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "offset": offset[1:, 3:].unflatten(0, x.shape[:-1]) if x.dim() > 1 else offset[1, 3:],
    }


def moved_to(device: str, value: Any) -> Any:
    """Tensors on the device, also those in lists, tuples and dictionaries; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved_to(device, one) for name, one in value.items()}
    return type(value)(moved_to(device, one) for one in value) if isinstance(value, list | tuple) else value


def run_on(device: str, op: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Calls an op on a device: its tensors are moved there, its results back to the CPU."""
    return moved_to("cpu", op(*moved_to(device, arguments), **moved_to(device, keywords)))


def check_int8_product(device: str, m: int, n: int, k: int) -> None:
    """``w8a8_gemm`` equals its oracle bit for bit; bias and dtypes vary with the sizes."""
    a, b = random_int8(m, k, seed=m), random_int8(n, k, seed=n)
    bias = (None, randn(n), randn(n, dtype=torch.bfloat16))[m % 3]
    arguments = (a, b, scales(m), scales(n, seed=1), bias, FLOATS[(m + n) % 3])
    assert_same_bits(run_on(device, ops.w8a8_gemm, *arguments), reference.w8a8_gemm(*arguments), (m, n, k))


def check_largest_int8_sums(device: str) -> None:
    """Sums near the ends of int32 are exact."""
    k = 131056  # the largest multiple of 16
    a, b = torch.full((20, k), 127, dtype=torch.int8), torch.full((8, k), 127, dtype=torch.int8)
    b[1::2] = -127
    arguments = (a, b, torch.ones(1), torch.ones(1), None, torch.float32)
    assert_same_bits(run_on(device, ops.w8a8_gemm, *arguments), reference.w8a8_gemm(*arguments))


Run = Callable[..., Any]
Call = Callable[[], object]
