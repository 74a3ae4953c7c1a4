"""Every op that a model needs on a GPU, through torch alone: what runs where no kernel of ours is proven.

Plain torch, without waiting for the device, so that CUDA graphs capture all of it but ``w8a8_experts``. Arguments that
do not fit raise what the compiled ops raise. On the CPU the same code runs on torch's CPU kernels, which is how it is
tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..experts import experts_one_by_one
from .fallback_checks import check
from .fallback_decoder_layer import w8a8_decoder_layer_
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


def w8a8_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
) -> Tensor:
    """See ``ops.w8a8_experts``. Made of other ops, which may be kernels; waits for the device, once."""
    check("experts", x, top_k_index, top_k_weights, weight, weight_scale, bias, activation)
    return experts_one_by_one(x, top_k_index, top_k_weights, weight, weight_scale, bias, activation)


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
