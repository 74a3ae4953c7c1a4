"""What torch's CUDA products insist on, for runs of the same code on the CPU, whose products take anything.

The rules are those of torch 2.11 to 2.13: aten/src/ATen/native/cuda/Blas.cpp, ScaledBlas.cpp, RowwiseScaledMM.cu.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default)


def check_int_mm(a: Tensor, b: Tensor) -> None:
    (m, k), (_, n) = a.shape, b.shape
    assert m > 16, f"{m} rows, expected more than 16"
    assert k % 8 == 0 < k, f"K={k}"
    assert n % 8 == 0 < n, f"N={n}"
    check_layout(a, b)


def check_layout(a: Tensor, b: Tensor) -> None:
    """Rows of ``a`` and columns of ``b`` lie side by side, and begin where 16 bytes can be read."""
    assert a.is_contiguous(), a.stride()
    assert b.t().is_contiguous(), b.stride()
    assert a.storage_offset() % 16 == b.storage_offset() % 16 == 0


def check_scaled_mm(arch: int, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, options: dict[str, Any]) -> None:
    bias, out_dtype = options.get("bias"), options.get("out_dtype")
    (m, k), (_, n) = a.shape, b.shape
    assert arch >= 89, f"no fp8 on {arch}"
    assert k % 16 == n % 16 == 0, f"K={k}, N={n}"
    assert {a.dtype, b.dtype} != {torch.float8_e5m2}
    check_layout(a, b)
    assert not options.get("scale_result")
    assert not options.get("use_fast_accum")
    assert a_scale.dtype == b_scale.dtype == torch.float32
    if a_scale.numel() != 1 or b_scale.numel() != 1:
        assert (a_scale.shape, b_scale.shape) == ((m, 1), (1, n))
        assert a_scale.is_contiguous()
        assert b_scale.is_contiguous()
        # What every build has: older ones than cuBLAS 12.9 take a kernel for these dtypes.
        assert arch == 90
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert out_dtype == torch.bfloat16
        assert k > 0  # else a bias is not added
    if bias is not None:
        assert bias.dtype == out_dtype != torch.float32
        assert bias.shape == (n,)
        assert bias.is_contiguous()
        assert bias.storage_offset() % 8 == 0  # cuBLASLt wants 16 bytes


class CudaRules(TorchDispatchMode):
    """Fails where torch would refuse a product on a GPU of this architecture; counts products and waits."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._int_mm.default:
            self.seen["int_mm"] += 1
            check_int_mm(*args, **kwargs)
        elif func is aten._scaled_mm.default:
            self.seen["scaled_mm"] += 1
            names = ("bias", "scale_result", "out_dtype", "use_fast_accum")
            check_scaled_mm(self.arch, *args[:4], dict(zip(names, args[4:], strict=False)) | kwargs)
        elif func is aten._to_copy.default and kwargs.get("dtype") == torch.int8 and not args[0].is_meta:
            assert not args[0].isnan().any(), "what a NaN becomes in INT8 depends on the device"
        elif func in WAITS:
            self.seen["wait"] += 1
        return func(*args, **kwargs)
