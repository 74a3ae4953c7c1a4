"""Runs in the workers of bench_ops.py: makes methods for a shape, checks them, and times one turn of a method."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from machine import last_level_cache_bytes
from peers import METHODS, Linear
from torch import Tensor

ROTATED_BYTES = max(192 << 20, last_level_cache_bytes() * 5 // 4)  # more than the caches hold
MOST_COPIES = 512
ROTATE_UP_TO = 16  # tokens; with more of them arithmetic takes longer than reading the weight
TURN_SECONDS = 0.02


@dataclass(frozen=True)
class Case:
    """A shape of the linear layer: y [m, n] = x [m, k] @ w [n, k]^T."""

    n: int
    k: int
    m: int


@dataclass(frozen=True)
class _Prepared:
    functions: list[Linear]
    x: Tensor
    calls: int


class OpsTimer:
    """Methods by name and shape, prepared and ready to be timed."""

    def __init__(self) -> None:
        self._prepared: dict[tuple[str, Case], _Prepared] = {}
        torch.set_grad_enabled(False)

    def prepare(self, name: str, case: Case) -> float:
        """Makes a method for a shape, in more copies than fit in the caches; returns its relative error."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(case.n, case.k, generator=generator).to(torch.bfloat16)
        x = torch.randn(case.m, case.k, generator=generator).to(torch.bfloat16)
        exact = x.float() @ weight.float().t()
        x = x.to(METHODS[name].dtype)
        copies = min(MOST_COPIES, -(-ROTATED_BYTES // (case.n * case.k))) if case.m <= ROTATE_UP_TO else 1
        functions = [METHODS[name].make(weight.clone()) for _ in range(copies)]
        results = [function(x) for function in functions]  # all of them: some compile or pack at their first call
        error = float((torch.as_tensor(results[-1]).float() - exact).norm() / exact.norm())
        start = time.perf_counter()
        functions[0](x)
        calls = max(copies, round(TURN_SECONDS / (time.perf_counter() - start)))  # every copy: none stays in a cache
        self._prepared[name, case] = _Prepared(functions, x, calls)
        return error

    def turn(self, name: str, case: Case) -> float:
        """Seconds of a call, the mean over one turn."""
        prepared = self._prepared[name, case]
        functions, x = prepared.functions, prepared.x
        functions[-1](x)  # wakes the threads
        start = time.perf_counter()
        for call in range(prepared.calls):
            functions[call % len(functions)](x)
        return (time.perf_counter() - start) / prepared.calls

    def clear(self) -> None:
        """Drops the prepared methods."""
        self._prepared.clear()
        torch.compiler.reset()
