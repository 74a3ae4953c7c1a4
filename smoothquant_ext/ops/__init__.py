"""The 8-bit ops: typed wrappers of ``torch.ops.sq``.

Letters in shapes: M tokens (any leading shape), K input features, N output features. A real value is ``q * scale``.
Arguments that do not fit raise ``RuntimeError`` with one sentence that names the op and the argument. Non-contiguous
tensors are accepted. ``reference`` holds the same functions in plain torch, which the kernels are tested against.
"""

from __future__ import annotations

# The compiled ops are loaded first: the files below look them up. There is one for each section of csrc/ops.cpp, where
# every op has its handle, its wrapper and its fake kernel. The handle is looked up once: every dot in
# torch.ops.sq.x.default costs as much as a small kernel.
from .backends import CPU_ISAS, OpInfo, cpu_isa, fast_linear_rows, info
from .decoder_layer import w8a8_decoder_layer_
from .experts import w8a8_experts
from .floating import attention, linear, rms_norm
from .gemm import prepack_weight, unpack_weight, w8a8_gemm, w8a8_linear, w8a8_linears, w8a8_mlp
from .norm_activation import (
    gelu_mul_quantize,
    gelu_quantize,
    layer_norm_quantize,
    relu_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from .quantize import quantize_per_token, quantize_static

__all__ = [
    "CPU_ISAS",
    "OpInfo",
    "attention",
    "cpu_isa",
    "fast_linear_rows",
    "gelu_mul_quantize",
    "gelu_quantize",
    "info",
    "layer_norm_quantize",
    "linear",
    "prepack_weight",
    "quantize_per_token",
    "quantize_static",
    "relu_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul_quantize",
    "unpack_weight",
    "w8a8_decoder_layer_",
    "w8a8_experts",
    "w8a8_gemm",
    "w8a8_linear",
    "w8a8_linears",
    "w8a8_mlp",
]
