"""What ``info`` says of the ops on this machine's GPUs: it reads what was proven, and proves nothing."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..declare import Declaration
from . import machine, settle
from .fallback import FALLBACKS
from .machine import Facts, Gpu
from .records import Record
from .timing import ranking

UNPROVEN = "not proven yet: the first use of a GPU, or 'smoothquant prove', proves them"


class Status(NamedTuple):
    """The GPUs of this machine and what was proven on them."""

    facts: Facts
    records: dict[Gpu, Record | None]
    """By kind of GPU; ``None`` before its proof."""

    def of_op(self, op: str, declaration: Declaration, dtype: str) -> tuple[str, str]:
        """What runs an op on the GPUs, ``cuda``, ``torch`` or ``none``, and why not something better.

        Args:
            op: its name.
            declaration: its declaration.
            dtype: of its products, or empty.
        """
        if why := machine.why_no_gpu(self.facts):
            return "none", why
        if op not in FALLBACKS and not declaration.cuda:
            return "none", declaration.why_not_cuda
        found = tuple(record for record in self.records.values() if record is not None)
        if why := machine.why_no_kernels(self.facts):
            return "torch", why
        if declaration.cuda and len(found) < len(self.records):
            return "cuda", UNPROVEN
        if why := settle.why_replaced(op, found):
            return "torch", why
        return "cuda", _ways(found, dtype) if "gemm" in declaration.cuda else ""


def _ways(found: tuple[Record, ...], dtype: str) -> str:
    """The ways to multiply that come first, by rows."""
    if forced := os.environ.get("SMOOTHQUANT_CUDA_GEMM"):
        return f"SMOOTHQUANT_CUDA_GEMM={forced}"
    first: dict[str, list[str]] = {}
    for row_class in ranking(found, dtype).split(";"):
        rows, _, ways = row_class.partition("=")
        first.setdefault(ways.partition(",")[0], []).append(f"up to {rows}" if rows else "more")
    return "rows: " + "; ".join(f"{way} {', '.join(rows)}" for way, rows in first.items())


def read() -> Status:
    """The status of this machine."""
    facts = machine.gather(settle.library_error())
    usable = not machine.why_no_gpu(facts) and not machine.why_no_kernels(facts)
    return Status(facts, settle.kinds(facts) if usable else {})
