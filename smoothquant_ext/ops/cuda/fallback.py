"""Every op that a model needs on a GPU, through torch alone: what runs where no kernel of ours is proven.

Plain torch, without waiting for the device, so that CUDA graphs capture all of it but ``w8a8_experts``. Arguments that
do not fit raise what the compiled ops raise. On the CPU the same code runs on torch's CPU kernels, which is how it is
tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .fallback_decoder_layer import w8a8_decoder_layer_
from .fallback_experts import w8a8_experts
from .fallback_floating import attention, linear
from .fallback_gemm import multiply, w8a8_gemm, w8a8_linear, w8a8_linear_group, w8a8_mlp
from .fallback_quantize import (
    gelu_mul_quantize,
    gelu_quantize,
    layer_norm_quantize,
    quantize_per_token,
    quantize_static,
    relu_quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul_quantize,
)

FALLBACKS: dict[str, Callable[..., Any]] = {
    "quantize_per_token": quantize_per_token,
    "quantize_static": quantize_static,
    "rms_norm_quantize": rms_norm_quantize,
    "layer_norm_quantize": layer_norm_quantize,
    "silu_mul_quantize": silu_mul_quantize,
    "gelu_mul_quantize": gelu_mul_quantize,
    "gelu_quantize": gelu_quantize,
    "relu_quantize": relu_quantize,
    "w8a8_gemm": w8a8_gemm,
    "w8a8_linear": w8a8_linear,
    "w8a8_linear_group": w8a8_linear_group,
    "w8a8_mlp": w8a8_mlp,
    "w8a8_experts": w8a8_experts,
    "w8a8_decoder_layer_": w8a8_decoder_layer_,
    "rms_norm": rms_norm,
    "linear": linear,
    "attention": attention,
    "_gemm_by_torch": multiply,
}
"""The implementation of each op by its name, with the op's arguments."""
