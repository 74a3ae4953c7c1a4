"""Loads the compiled ops, and tells which kernel each will run on here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..ops import cuda_kernels
from .declare import DECLARED, Declaration

__all__ = ["OpInfo", "cpu_isa", "cpu_isas", "fast_linear_rows", "info"]


def _load_library(name: str) -> None:
    """Loads a shared object of the package; raises ``ImportError`` with the dynamic linker's reason."""
    path = Path(__file__).parents[1] / name
    if not path.is_file():
        raise ImportError(
            f"smoothquant_ext is not compiled: {name} is missing; run 'pip install .' in its source folder"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # torch's own message names the file only; the linker's is the cause.
        reason = repr(error.__cause__) if error.__cause__ is not None else str(error)
        raise ImportError(f"smoothquant_ext cannot load {name}: {reason}") from error


def _load_cuda() -> str:
    """Loads the CUDA kernels; returns why they are not there, or an empty string."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        _load_library("_C_cuda.so")
    except ImportError as error:
        return str(error)
    for entry in cuda_kernels.read_validations():
        for family in entry.kernels:
            torch.ops.sq._set_cuda_validated(family, entry.arch)
    return ""


_load_library("_C.so")
_cuda_missing = _load_cuda()


class OpInfo(NamedTuple):
    """One row of ``info``: which backend an op uses on a device, and why not a better one."""

    op: str
    device: str
    backend: str
    reason: str


PRODUCTS = ("gemm", "experts")  # kernels that are validated for each dtype
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
    return f"{name}_{dtype}" if name in PRODUCTS else name


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
    facts = cuda_kernels.gather(_cuda_missing)
    validations = cuda_kernels.read_validations()
    for op, declaration, dtype in _rows():
        if declaration.cuda:
            families = tuple(_family(name, dtype) for name in declaration.cuda)
            backend, reason = cuda_kernels.choose(facts, families, validations)
        else:
            why_not = f"for the CPU only: {declaration.why_not_cuda}"
            backend, reason = "none", cuda_kernels.why_not_at_all(facts) or why_not
        yield OpInfo(op, "cuda", backend, reason)


def info() -> list[OpInfo]:
    """For every op and device, the backend that will run here, and why better ones will not.

    Raises:
        RuntimeError: as ``cpu_isa``.
    """
    reason = _cpu_reason()
    kernels = ((op, torch.ops.sq.cpu_kernel(_family(declaration.cpu, dtype))) for op, declaration, dtype in _rows())
    return [*(OpInfo(op, "cpu", kernel, reason) for op, kernel in kernels), *_cuda_rows()]
