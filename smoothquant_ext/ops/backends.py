"""Tells which kernel each op will run on here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import SmoothQuantError
from . import library
from .declare import DECLARED, Declaration

__all__ = ["OpInfo", "cpu_isa", "cpu_isas", "fast_linear_rows", "info"]

library.load(library.CPU)


class OpInfo(NamedTuple):
    """One row of ``info``: which backend an op uses on a device, and why not a better one."""

    op: str
    device: str
    backend: str
    reason: str


GEMM_DTYPES = ("int8", "fp8")  # an op that needs the kernels "gemm" has a row for each


def _rows() -> Iterator[tuple[str, Declaration, str]]:
    """The rows of ``info`` on one device: its name for an op, the declaration, and the dtype of the products."""
    for op, declaration in DECLARED.items():
        if declaration.cpu == "gemm":
            yield from ((f"{op}, {dtype}", declaration, dtype) for dtype in GEMM_DTYPES)
        else:
            yield op, declaration, ""


def _family(name: str, dtype: str) -> str:
    """A family of kernels as the compiled libraries call it."""
    return f"gemm_{dtype}" if name == "gemm" else name


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that the CPU kernels were compiled for, fastest first; this CPU may have fewer."""
    return tuple(torch.ops.sq.cpu_isas().split(","))


def cpu_isa() -> str:
    """The instruction set in use on the CPU: one of ``cpu_isas``.

    The environment variable SMOOTHQUANT_CPU_ISA forces one, and is read once per process.

    Raises:
        RuntimeError: if SMOOTHQUANT_CPU_ISA names an unknown one, or one that this machine cannot run.
    """
    isa: str = torch.ops.sq.cpu_isa()
    return isa


def check_cpu_isa() -> None:
    """Raises SmoothQuantError if SMOOTHQUANT_CPU_ISA is not an instruction set that this machine runs."""
    try:
        cpu_isa()
    except RuntimeError as error:
        raise SmoothQuantError(str(error).splitlines()[0]) from error


# By kernel: Zen 5 and Emerald Rapids, November 2026. The portable one is slower than torch's.
_FAST_LINEAR_ROWS = {"portable": 0, "avx512bf16": 16, "amx": 32}


def fast_linear_rows() -> int:
    """Rows of ``x`` up to which ``ops.linear`` is faster than torch on this CPU; 0 if it never is."""
    return _FAST_LINEAR_ROWS[torch.ops.sq.cpu_kernel("linear")]


def _cpu_reason() -> str:
    isa = cpu_isa()
    if forced := os.environ.get("SMOOTHQUANT_CPU_ISA"):
        return f"SMOOTHQUANT_CPU_ISA={forced}"
    isas = cpu_isas()
    better = isas[: isas.index(isa)]
    return "; ".join(f"no {name}: {torch.ops.sq.cpu_isa_why_not(name)}" for name in better)


def _cuda_rows() -> Iterator[OpInfo]:
    from .cuda import status  # which reads the declarations of all ops

    now = status.read()
    for op, declaration, dtype in _rows():
        yield OpInfo(op, "cuda", *now.of_op(op.partition(",")[0], declaration, dtype))


def info() -> list[OpInfo]:
    """For every op and device, the backend that will run here, and why better ones will not.

    Raises:
        RuntimeError: as ``cpu_isa``.
    """
    reason = _cpu_reason()
    kernels = ((op, torch.ops.sq.cpu_kernel(_family(declaration.cpu, dtype))) for op, declaration, dtype in _rows())
    return [*(OpInfo(op, "cpu", kernel, reason) for op, kernel in kernels), *_cuda_rows()]
