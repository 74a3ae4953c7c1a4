"""Loads the compiled ops, and tells which kernel each will run on here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..ops import cuda_kernels


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


CPU_ISAS = ("amx", "avx512bf16", "avx512vnni", "avxvnni", "avx2", "portable")  # fastest first

# What the table shows: an op, the family of its CPU kernels, and the families of CUDA kernels that it needs.
_OPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("quantize_per_token", "quantize", ("quantize",)),
    ("quantize_static", "quantize", ("quantize",)),
    ("prepack_weight", "pack", ()),
    ("w8a8_gemm, int8", "gemm_int8", ("gemm_int8",)),
    ("w8a8_gemm, fp8", "gemm_fp8", ("gemm_fp8",)),
    ("w8a8_linear, int8", "gemm_int8", ("quantize", "gemm_int8")),
    ("w8a8_linear, fp8", "gemm_fp8", ("quantize", "gemm_fp8")),
    ("w8a8_linears, int8", "gemm_int8", ("quantize", "gemm_int8")),
    ("w8a8_linears, fp8", "gemm_fp8", ("quantize", "gemm_fp8")),
    ("w8a8_mlp, int8", "gemm_int8", ("quantize", "rows", "gemm_int8")),
    ("w8a8_mlp, fp8", "gemm_fp8", ("quantize", "rows", "gemm_fp8")),
    ("w8a8_experts, int8", "gemm_int8", ()),
    ("w8a8_experts, fp8", "gemm_fp8", ()),
    ("w8a8_decoder_layer_", "gemm_int8", ()),
    ("rms_norm_quantize", "rows", ("rows",)),
    ("layer_norm_quantize", "rows", ("rows",)),
    ("silu_mul_quantize", "rows", ("rows",)),
    ("gelu_mul_quantize", "rows", ("rows",)),
    ("gelu_quantize", "rows", ("rows",)),
    ("relu_quantize", "rows", ("rows",)),
    ("rms_norm", "rows", ("rows",)),
    ("linear", "linear", ()),
    ("attention", "attention", ()),
)

# Why some ops need no CUDA kernel.
_CPU_ONLY = {
    "prepack_weight": "for the CPU only: the CUDA kernels read a weight as it lies",
    "w8a8_experts": "for the CPU only: on a GPU the experts run one by one",
    "w8a8_decoder_layer_": "for the CPU only: on a GPU a model runs its modules one by one",
    "linear": "for the CPU only: on a GPU torch's own is used",
    "attention": "for the CPU only: on a GPU transformers' own is used",
}


def cpu_isa() -> str:
    """The instruction set in use on the CPU: one of ``CPU_ISAS``.

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
    better = CPU_ISAS[: CPU_ISAS.index(isa)]
    return "; ".join(f"no {name}: {torch.ops.sq.cpu_isa_why_not(name)}" for name in better)


def _cuda_rows() -> list[OpInfo]:
    facts = cuda_kernels.gather(_cuda_missing)
    validations = cuda_kernels.read_validations()
    rows = []
    for op, _, families in _OPS:
        if families:
            backend, reason = cuda_kernels.choose(facts, families, validations)
        else:
            backend, reason = "none", cuda_kernels.why_not_at_all(facts) or _CPU_ONLY[op.partition(",")[0]]
        rows.append(OpInfo(op, "cuda", backend, reason))
    return rows


def info() -> list[OpInfo]:
    """For every op and device, the backend that will run here, and why better ones will not.

    Raises:
        RuntimeError: as ``cpu_isa``.
    """
    reason = _cpu_reason()
    rows = [OpInfo(op, "cpu", torch.ops.sq.cpu_kernel(family), reason) for op, family, _ in _OPS]
    return rows + _cuda_rows()
