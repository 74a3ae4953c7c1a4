"""8-bit products on a GPU through torch alone: ``y = (a @ b.T) * (a_scale * b_scale) + bias``.

``choose_product`` picks one of these by a pure function, so that it can be tested for every GPU without one:

| product | torch's | then | where |
|---|---|---|---|
| ``int8`` | ``_int_mm`` to int32 | scales, bias and cast | INT8 |
| ``fp8_rows`` | ``_scaled_mm``, which scales and adds the bias too | - | e4m3 by e4m3 to bf16 on 9.0 |
| ``fp8`` | ``_scaled_mm`` with scales of 1, to fp32 | scales, bias and cast | other FP8 from 8.9 on |
| ``wide`` | ``mm`` of both in 16 bits, to fp32 | scales, bias and cast | FP8 on older GPUs; e5m2 by e5m2 |

torch wants (2.11 to 2.13; aten/src/ATen/native/cuda/Blas.cpp, ScaledBlas.cpp, RowwiseScaledMM.cu):

- ``_int_mm``: more than 16 rows, K and N in multiples of 8.
- ``_scaled_mm``: compute capability 8.9 or from 9.0 on, K and N in multiples of 16, not two e5m2. Scales [M, 1] and
  [1, N], contiguous: from cuBLAS 12.9 on cuBLASLt takes them on 9.0; before, and on other GPUs, a kernel of CUTLASS,
  which every build of torch has for an e4m3 weight and bf16 only. A bias has the 16-bit dtype of the result.
- both: rows of ``a`` and of ``b`` contiguous. What is not a multiple is padded with zeros here.
- ``mm`` with an ``out_dtype`` of fp32 does not round its fp32 sums. The widening is exact: bf16 and fp16 have the
  exponents and mantissas of e4m3, and fp16 has those of e5m2, bf16 more. Tensor cores take bf16 from 8.0 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .fallback_checks import check
from .fallback_quantize import activate, quantize_rows

FP8_ARCH = 89
"""The oldest architecture that multiplies fp8; 90 for compute capability 9.0."""
ROW_SCALES_ARCH = 90
"""The architecture on which ``_scaled_mm`` takes scales per row and column at the speed of one for all."""
BF16_ARCH = 80
"""The oldest architecture whose tensor cores take bf16; before, fp16."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Problem(NamedTuple):
    """What the choice of a product depends on; y [M, n] of a [M, k] and b [n, k]."""

    arch: int
    """10 * major + minor of the compute capability; 0 for a device that is no GPU."""
    n: int
    k: int
    a: torch.dtype
    b: torch.dtype
    y: torch.dtype
    bias: torch.dtype | None


def choose_product(problem: Problem) -> str:
    """The name of a product in ``PRODUCTS``."""
    if problem.a == torch.int8:
        return "int8"
    if problem.arch < FP8_ARCH or (problem.a == E5M2 and problem.b == E5M2):
        return "wide"
    takes_rows = (
        problem.arch == ROW_SCALES_ARCH
        and problem.a == problem.b == E4M3
        and problem.y == torch.bfloat16
        and problem.bias in (None, torch.bfloat16)
        and problem.n % 16 == problem.k % 16 == 0 < problem.k
    )
    return "fp8_rows" if takes_rows else "fp8"


def arch_of(device: torch.device) -> int:
    """The ``arch`` of a ``Problem``."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


class Operands(NamedTuple):
    """The arguments of a product, in two dimensions."""

    a: Tensor
    """[M, K], contiguous."""
    b: Tensor
    """[N, K], contiguous."""
    a_scale: Tensor
    """fp32 [M, 1] or []."""
    b_scale: Tensor
    """fp32 [N] or []."""
    bias: Tensor | None
    """[N]."""
    out_dtype: torch.dtype

    @property
    def problem(self) -> Problem:
        bias = None if self.bias is None else self.bias.dtype
        arch = arch_of(self.a.device)
        return Problem(arch, self.b.shape[0], self.b.shape[1], self.a.dtype, self.b.dtype, self.out_dtype, bias)


def _aligned(x: Tensor) -> Tensor:
    """``x``, contiguous, at an address that 16 bytes can be read from at once; a compiler sees to that itself."""
    x = x.contiguous()
    if torch.compiler.is_compiling():
        return x
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def _to_multiple(size: int, multiple: int) -> int:
    """What is missing to a positive multiple."""
    return -size % multiple if size else multiple


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` with so many more rows and columns of zeros, of any 8-bit dtype."""
    return pad(x.view(torch.int8), (0, columns, 0, rows)).view(x.dtype) if rows or columns else x


def scaled(sums: Tensor, operands: Operands) -> Tensor:
    """Scales, bias and cast of sums [M or more, N or more]; the product of the scales, each step rounds once."""
    y = sums[: operands.a.shape[0], : operands.b.shape[0]].float().contiguous()
    y = y.mul_(operands.a_scale * operands.b_scale)
    if operands.bias is not None:
        y = y.add_(operands.bias.float())
    return y.to(operands.out_dtype)


def _multiply_int8(operands: Operands) -> Tensor:
    a, b, (n, k) = operands.a, operands.b, operands.b.shape
    more_rows = 32 - a.shape[0] if a.shape[0] <= 16 else 0
    more_k = _to_multiple(k, 8)
    sums = torch._int_mm(_padded(a, more_rows, more_k), _padded(b, _to_multiple(n, 8), more_k).t())
    return scaled(sums, operands)


def _multiply_fp8_rows(operands: Operands) -> Tensor:
    (m, _), (n, _) = operands.a.shape, operands.b.shape
    # As vectors first: torch refuses the stride 0 of a single number that was expanded to a matrix.
    a_scale = _aligned(operands.a_scale.reshape(-1).expand(m)).view(m, 1)
    b_scale = _aligned(operands.b_scale.reshape(-1).expand(n)).view(1, n)
    bias = None if operands.bias is None else _aligned(operands.bias)
    return torch._scaled_mm(operands.a, operands.b.t(), a_scale, b_scale, bias=bias, out_dtype=operands.out_dtype)


def _multiply_fp8(operands: Operands) -> Tensor:
    a, b, (n, k) = operands.a, operands.b, operands.b.shape
    one = a.new_ones((), dtype=torch.float32)
    more_k = _to_multiple(k, 16)
    a, b = _padded(a, 0, more_k), _padded(b, _to_multiple(n, 16), more_k)
    return scaled(torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32), operands)


def wide_sums(a: Tensor, b: Tensor) -> Tensor:
    """fp32 ``a @ b.T`` of values that a 16-bit dtype holds exactly."""
    if not a.is_cuda:
        return a.float() @ b.float().t()  # elsewhere torch's mm has no out_dtype
    dtype = torch.bfloat16 if arch_of(a.device) >= BF16_ARCH else torch.float16
    return torch.mm(a.to(dtype), b.to(dtype).t(), out_dtype=torch.float32)


def _multiply_wide(operands: Operands) -> Tensor:
    return scaled(wide_sums(operands.a, operands.b), operands)


PRODUCTS: Mapping[str, Callable[[Operands], Tensor]] = {
    "int8": _multiply_int8,
    "fp8_rows": _multiply_fp8_rows,
    "fp8": _multiply_fp8,
    "wide": _multiply_wide,
}


def multiply(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``ops.w8a8_gemm`` of arguments that are checked already."""
    operands = Operands(
        _aligned(a.unsqueeze(0).flatten(0, -2)),
        _aligned(b),
        a_scale.reshape(()) if a_scale.numel() == 1 else a_scale.reshape(-1, 1),
        b_scale.reshape(()) if b_scale.numel() == 1 else b_scale.reshape(-1),
        None if bias is None else bias.reshape(-1),
        out_dtype,
    )
    y = PRODUCTS[choose_product(operands.problem)](operands)
    return y.reshape(*a.shape[:-1], b.shape[0])


# --- the ops --------------------------------------------------------------------------------------------------------


def w8a8_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See ``ops.w8a8_gemm``."""
    check("gemm", a, b, a_scale, b_scale, bias, out_dtype)
    return multiply(a, b, a_scale, b_scale, bias, out_dtype)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    smooth: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> Tensor:
    """See ``ops.w8a8_linear``."""
    check("w8a8_linear", x, weight, weight_scale, bias, input_scale, smooth, out_dtype, rotate)
    q, scale = quantize_rows(x, weight.dtype, input_scale, smooth, rotate)
    return multiply(q, weight, scale, weight_scale, bias, out_dtype or x.dtype)


def w8a8_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rotate: int = 0,
) -> list[Tensor]:
    """See ``ops.w8a8_linear_group``."""
    check("linear_group", x, weight, weight_scale, bias, input_scale, out_dtype, rotate)
    q, scale = quantize_rows(x, weight[0].dtype, input_scale, rotate=rotate)
    layers = zip(weight, weight_scale, bias or [None] * len(weight), strict=True)
    return [multiply(q, w, scale, w_scale, own, out_dtype or x.dtype) for w, w_scale, own in layers]


def w8a8_mlp(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    input_scale: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """See ``ops.w8a8_mlp``."""
    check("mlp", x, weight, weight_scale, bias, input_scale, activation, rotate)
    x_scale, down_scale = input_scale or (None, None)
    x_rotate, down_rotate = rotate or (0, 0)
    *first, (down, down_weight_scale, down_bias) = zip(weight, weight_scale, bias or [None] * len(weight), strict=True)
    q, scale = quantize_rows(x, weight[0].dtype, x_scale, rotate=x_rotate)
    inner = [multiply(q, w, scale, w_scale, own, x.dtype) for w, w_scale, own in first]
    hidden, hidden_scale = quantize_rows(activate(activation, *inner), down.dtype, down_scale, rotate=down_rotate)
    return multiply(hidden, down, hidden_scale, down_weight_scale, down_bias, x.dtype)
