"""A call of an op leaves no memory behind: lists, text and optional arguments are copied on their way in."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CASES, OpCase, Problem
from op_testing import threads

from smoothquant_ext import ops

LIBC = ctypes.CDLL("libc.so.6")
pytestmark = pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs glibc 2.33")


class MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def bytes_in_use() -> int:
    LIBC.mallinfo2.restype = MallInfo
    info = LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_collected() -> Iterator[None]:
    """A collection that looks at all modules takes as long as thousands of calls."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def left_behind(call: Callable[[], object], calls: int = 100) -> float:
    """Bytes that a call leaves behind; what grows once is a cache, and does not count."""
    for _ in range(10):
        call()
    grown = []
    for _ in range(3):
        gc.collect()
        before = bytes_in_use()
        for _ in range(calls):
            call()
        gc.collect()
        grown.append((bytes_in_use() - before) / calls)
    return min(grown)


LEAK = 8  # bytes a call; the allocator's smallest block has 24


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_leaves_no_memory_behind(case: OpCase, count: int) -> None:
    *_, arguments = case.make(Problem(dtype=case.floats[0]))
    with threads(count):
        assert left_behind(lambda: case.op(**arguments), calls=100 if count == 1 else 20) < LEAK


def test_a_refused_call_leaves_no_memory_behind() -> None:
    x = torch.ones(2, 64)

    def refused() -> None:
        with pytest.raises(RuntimeError):
            ops.gelu_quantize(x, torch.int8, None, "nonsense")

    assert left_behind(refused) < LEAK


@pytest.mark.parametrize("size", [50, 5000])
def test_a_leak_is_found(size: int) -> None:
    LIBC.malloc.restype = ctypes.c_void_p
    LIBC.free.argtypes = [ctypes.c_void_p]
    *_, arguments = CASES["w8a8_mlp"].make(Problem())
    lost: list[Any] = []

    def leaking() -> None:
        CASES["w8a8_mlp"].op(**arguments)
        lost.append(LIBC.malloc(size))

    try:
        assert left_behind(leaking) >= size
    finally:
        for block in lost:
            LIBC.free(block)
