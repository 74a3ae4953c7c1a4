"""The 8-bit ops: typed wrappers of ``torch.ops.sq``, their fake kernels, and what each will run on here.

Letters in shapes: M tokens (any leading shape), K input features, N output features. A real value is ``q * scale``.
Arguments that do not fit raise ``RuntimeError`` with one sentence that names the op and the argument. Non-contiguous
tensors are accepted. ``reference`` holds the same functions in plain torch, which the kernels are tested against.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import unpack_weight as _unpack_weight

__all__ = [
    "CPU_ISAS",
    "OpInfo",
    "attention",
    "cpu_isa",
    "info",
    "prepack_weight",
    "quantize_per_token",
    "quantize_static",
    "rms_norm",
    "silu_mul_w8a8_linear",
    "unpack_weight",
    "w8a8_gemm",
    "w8a8_linear",
]


# --- loading --------------------------------------------------------------------------------------------------------


def _load_library(name: str) -> None:
    """Loads a shared object that lies beside this file; raises ``ImportError`` with the dynamic linker's reason."""
    path = Path(__file__).with_name(name)
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
    return ""


_load_library("_C.so")
_cuda_missing = _load_cuda()


# --- ops ------------------------------------------------------------------------------------------------------------


def quantize_per_token(x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes every row of ``x`` (divided by ``smooth`` first) with its own scale.

    ``scale = absmax / qmax`` and ``q = round(x * (qmax / absmax))``, half to even, in fp32; qmax is 127, 448 (e4m3fn)
    or 57344 (e5m2). A row of zeros gets scale 1; a row with a NaN or an infinity gets scale NaN and q = 0.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
        smooth: fp32 [K], or ``None``.

    Returns:
        q, of ``dtype`` [..., K], and scale, fp32 [...].

    Raises:
        RuntimeError: for another dtype, or a ``smooth`` that does not have K elements.
    """
    q, scale = torch.ops.sq.quantize_per_token.default(x, dtype, smooth)
    return q, scale


def quantize_static(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantizes ``x`` with one given scale: ``q = round(x * (1 / scale))``, half to even, saturating at +-qmax.

    NaN becomes 0 in INT8 and NaN in fp8.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        scale: fp32, one element, positive and finite.
        dtype: ``torch.int8``, ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.

    Returns:
        q, of ``dtype`` [..., K].

    Raises:
        RuntimeError: for another dtype, or a scale that is not one positive finite fp32 number.
    """
    q: Tensor = torch.ops.sq.quantize_static.default(x, scale, dtype)
    return q


def prepack_weight(b: Tensor) -> Tensor:
    """Reorders a weight for the CPU kernels, so that a product need not do it on every call.

    Args:
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], on the CPU.

    Returns:
        The same dtype, [ceil(N / 64), ceil(K / 64) * 16 + 1, 64, 4], where element [p, k4, n, j] is
        b[64 p + n, 4 k4 + j], zero padded; the last k4 row of an INT8 weight holds the int32 sums of its columns. The
        layout is the same on every CPU.

    Raises:
        RuntimeError: for another dtype or shape, or an INT8 K above 133144.
    """
    packed: Tensor = torch.ops.sq.prepack_weight.default(b)
    return packed


def unpack_weight(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [out_features, in_features] that ``prepack_weight`` packed."""
    return _unpack_weight(packed, out_features, in_features)


def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The product of 8-bit matrices: ``y = (a @ b.T) * (a_scale * b_scale) + bias``.

    INT8 sums are exact; then the product of the scales, the scaling, the bias and the cast round once each, so that
    every kernel gives the same bits. FP8 products are summed in fp32.

    Args:
        a: int8 [..., K]; or float8_e4m3fn or float8_e5m2.
        b: [N, K], or packed; int8 when ``a`` is, else either float8.
        a_scale: fp32, 1 or M elements, any shape.
        b_scale: fp32, 1 or N elements, any shape; N elements when ``b`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        out_dtype: fp32, bf16 or fp16.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 133144.
    """
    y: Tensor = torch.ops.sq.w8a8_gemm.default(a, b, a_scale, b_scale, bias, out_dtype)
    return y


def w8a8_linear(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantizes ``x`` and multiplies it with an 8-bit weight: a linear layer in one call.

    The activation gets the dtype of ``b``. A row of ``x`` with a NaN or an infinity gives a row of NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], or packed.
        b_scale: fp32, 1 or N elements, any shape; N elements when ``b`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        a_scale: fp32, one element (see ``quantize_static``), or ``None`` for one a row (see ``quantize_per_token``).
        smooth: fp32 [K], divides ``x`` first, or ``None``.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``x``.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 133144.
    """
    y: Tensor = torch.ops.sq.w8a8_linear.default(x, b, b_scale, bias, a_scale, smooth, out_dtype)
    return y


def silu_mul_w8a8_linear(
    gate: Tensor,
    up: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The second half of a gated MLP in one call: ``w8a8_linear(silu(gate) * up, b, ...)``.

    ``gate / (1 + exp(-gate)) * up`` is computed in fp32 and goes to the quantizer unrounded; exp has an error under
    2 ulp and is the same on every CPU.

    Args:
        gate: fp32, bf16 or fp16 [..., K].
        up: the same dtype and shape.
        b: int8, float8_e4m3fn or float8_e5m2 [N, K], or packed.
        b_scale: fp32, 1 or N elements, any shape; N elements when ``b`` is packed.
        bias: fp32, bf16 or fp16 [N], or ``None``.
        a_scale: fp32, one element, or ``None`` for a scale per row.
        out_dtype: fp32, bf16 or fp16; ``None`` is the dtype of ``gate``.

    Returns:
        y, of ``out_dtype`` [..., N].

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or an INT8 K above 133144.
    """
    y: Tensor = torch.ops.sq.silu_mul_w8a8_linear.default(gate, up, b, b_scale, bias, a_scale, out_dtype)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dimension: ``x / sqrt(mean(x * x) + eps) * (offset + weight)``.

    Computed in fp32, rounded once. ``offset`` is 1 for models that store their weight less 1 (Gemma).

    Args:
        x: fp32, bf16 or fp16 [..., K].
        weight: fp32, bf16 or fp16 [K].
        eps: added to the mean of the squares.
        offset: added to the weight.

    Returns:
        y, of the dtype and shape of ``x``.

    Raises:
        RuntimeError: for another dtype, or a weight that does not have K elements.
    """
    y: Tensor = torch.ops.sq.rms_norm.default(x, weight, eps, offset)
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Scaled dot-product attention: ``softmax(scale * q @ k.T) @ v`` over the keys that each query may see.

    Scores, softmax and sums are fp32; probabilities of bf16 inputs are rounded to bf16 where the CPU multiplies bf16.
    A query that sees no key gives 0.

    Args:
        q: fp32, bf16 or fp16 [B, H, T, D], any strides.
        k: the same dtype, [B, Hkv, S, D], where H is a multiple of Hkv: head h reads head h // (H // Hkv).
        v: the same dtype, [B, Hkv, S, Dv].
        mask: bool [1 or B, 1 or H, T, S], true where a query may see a key; or ``None``.
        scale: positive, usually ``D ** -0.5``.
        causal: whether query i sees only keys up to i + S - T, as the last T of S tokens do.

    Returns:
        y, of the dtype of ``q`` [B, T, H, Dv], contiguous: heads side by side, as the output projection reads them.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, or a scale that is not positive and finite.
    """
    y: Tensor = torch.ops.sq.attention.default(q, k, v, mask, scale=scale, causal=causal)
    return y


# --- fake kernels: shapes and dtypes alone, symbolic sizes stay symbolic ----------------------------------------------


def _check_devices(op: str, first: str, x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{op}: {name} is on {tensor.device}, but {first} is on {x.device}")


def _out_features(b: Tensor, b_scale: Tensor) -> int:
    return b.shape[0] if b.dim() == 2 else b_scale.numel()


@torch.library.register_fake("sq::quantize_per_token")
def _(x: Tensor, dtype: torch.dtype, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_devices("quantize_per_token", "x", x, smooth=smooth)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("sq::quantize_static")
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_devices("quantize_static", "x", x, scale=scale)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("sq::prepack_weight")
def _(b: Tensor) -> Tensor:
    n, k = b.shape
    return b.new_empty((n + 63) // 64, (k + 63) // 64 * 16 + 1, 64, 4)


@torch.library.register_fake("sq::w8a8_gemm")
def _(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _check_devices("w8a8_gemm", "a", a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    return a.new_empty((*a.shape[:-1], _out_features(b, b_scale)), dtype=out_dtype)


@torch.library.register_fake("sq::w8a8_linear")
def _(
    x: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_devices("w8a8_linear", "x", x, b=b, b_scale=b_scale, bias=bias, a_scale=a_scale, smooth=smooth)
    return x.new_empty((*x.shape[:-1], _out_features(b, b_scale)), dtype=out_dtype or x.dtype)


@torch.library.register_fake("sq::silu_mul_w8a8_linear")
def _(
    gate: Tensor,
    up: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check_devices("silu_mul_w8a8_linear", "gate", gate, up=up, b=b, b_scale=b_scale, bias=bias, a_scale=a_scale)
    return gate.new_empty((*gate.shape[:-1], _out_features(b, b_scale)), dtype=out_dtype or gate.dtype)


@torch.library.register_fake("sq::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    _check_devices("rms_norm", "x", x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("sq::attention")
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float, causal: bool = False) -> Tensor:
    _check_devices("attention", "q", q, k=k, v=v, mask=mask)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


# --- what will run here ---------------------------------------------------------------------------------------------


class OpInfo(NamedTuple):
    """One row of ``info``: which backend an op uses on a device, and why not a better one."""

    op: str
    device: str
    backend: str
    reason: str


CPU_ISAS = ("amx", "avx512bf16", "avx512vnni", "avxvnni", "avx2", "portable")  # fastest first

# What the table shows, and the family of kernels that it runs on.
_OPS = (
    ("quantize_per_token", "quantize"),
    ("quantize_static", "quantize"),
    ("prepack_weight", "pack"),
    ("w8a8_gemm, int8", "gemm_int8"),
    ("w8a8_gemm, fp8", "gemm_fp8"),
    ("w8a8_linear, int8", "gemm_int8"),
    ("w8a8_linear, fp8", "gemm_fp8"),
    ("silu_mul_w8a8_linear", "rows"),
    ("rms_norm", "rows"),
    ("attention", "attention"),
)


def cpu_isa() -> str:
    """The instruction set in use on the CPU: one of ``CPU_ISAS``.

    The environment variable SMOOTHQUANT_CPU_ISA forces one, and is read once per process.

    Raises:
        RuntimeError: if SMOOTHQUANT_CPU_ISA names an unknown one, or one that this machine cannot run.
    """
    isa: str = torch.ops.sq.cpu_isa()
    return isa


def _cpu_reason() -> str:
    isa = cpu_isa()
    if forced := os.environ.get("SMOOTHQUANT_CPU_ISA"):
        return f"SMOOTHQUANT_CPU_ISA={forced}"
    better = CPU_ISAS[: CPU_ISAS.index(isa)]
    return "; ".join(f"no {name}: {torch.ops.sq.cpu_isa_why_not(name)}" for name in better)


def _cuda_row(op: str) -> OpInfo:
    if _cuda_missing:
        return OpInfo(op, "cuda", "none", _cuda_missing)
    name = op.partition(",")[0]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sq::{name}", "CUDA"):
        return OpInfo(op, "cuda", "none", "there is no CUDA kernel yet")
    unvalidated = "no CUDA kernel has been validated on hardware yet"
    if os.environ.get("SMOOTHQUANT_UNVALIDATED_CUDA") == "1":
        return OpInfo(op, "cuda", "cuda", f"{unvalidated}; allowed by SMOOTHQUANT_UNVALIDATED_CUDA=1")
    return OpInfo(op, "cuda", "none", f"{unvalidated}; SMOOTHQUANT_UNVALIDATED_CUDA=1 allows it")


def info() -> list[OpInfo]:
    """For every op and device, the backend that will run here, and why better ones will not.

    Raises:
        RuntimeError: as ``cpu_isa``.
    """
    reason = _cpu_reason()
    rows = [OpInfo(op, "cpu", torch.ops.sq.cpu_kernel(family), reason) for op, family in _OPS]
    return rows + [_cuda_row(op) for op, _ in _OPS]
