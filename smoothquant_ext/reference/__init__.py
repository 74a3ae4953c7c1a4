"""The oracles: every op in plain torch, written for reading, which the kernels are tested against."""

from .decoder_layer import w8a8_decoder_layer_
from .experts import w8a8_experts
from .floating import attention, linear
from .gemm import prepack_weight, w8a8_gemm, w8a8_linear, w8a8_linear_group, w8a8_mlp
from .norm_activation import (
    ACTIVATIONS,
    gelu,
    gelu_mul_quantize,
    gelu_quantize,
    gelu_tanh,
    layer_norm_quantize,
    relu,
    relu_quantize,
    rms_norm,
    rms_norm_quantize,
    silu,
    silu_mul_quantize,
)
from .quantize import quantize_per_token, quantize_static

__all__ = [
    "ACTIVATIONS",
    "attention",
    "gelu",
    "gelu_mul_quantize",
    "gelu_quantize",
    "gelu_tanh",
    "layer_norm_quantize",
    "linear",
    "prepack_weight",
    "quantize_per_token",
    "quantize_static",
    "relu",
    "relu_quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu",
    "silu_mul_quantize",
    "w8a8_decoder_layer_",
    "w8a8_experts",
    "w8a8_gemm",
    "w8a8_linear",
    "w8a8_linear_group",
    "w8a8_mlp",
]
