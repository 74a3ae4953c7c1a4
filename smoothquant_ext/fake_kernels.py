"""What the ops return without computing it, for ``torch.compile`` and meta tensors: shapes and dtypes alone. Symbolic
sizes stay symbolic: nothing here turns one into a number."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends as backends  # defines the ops


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


@torch.library.register_fake("sq::w8a8_linears")
def _(
    x: Tensor,
    b: list[Tensor],
    b_scale: list[Tensor],
    bias: list[Tensor],
    a_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    outputs = []
    for index, (weight, scale) in enumerate(zip(b, b_scale, strict=True)):
        own_bias = bias[index] if bias else None
        _check_devices("w8a8_linears", "x", x, b=weight, b_scale=scale, bias=own_bias, a_scale=a_scale)
        outputs.append(x.new_empty((*x.shape[:-1], _out_features(weight, scale)), dtype=out_dtype or x.dtype))
    return outputs


@torch.library.register_fake("sq::w8a8_mlp")
def _(
    x: Tensor,
    gate: Tensor,
    gate_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    a_scale: Tensor | None = None,
    down_a_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    _check_devices("w8a8_mlp", "x", x, gate=gate, gate_scale=gate_scale, down=down, down_scale=down_scale, up=up)
    return x.new_empty((*x.shape[:-1], _out_features(down, down_scale)))


@torch.library.register_fake("sq::w8a8_decoder_layer_")
def _(
    x: Tensor,
    norm: Tensor,
    post_norm: Tensor,
    eps: float,
    post_eps: float,
    offset: float,
    b: list[Tensor],
    b_scale: list[Tensor],
    bias: list[Tensor],
    a_scale: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    past: int,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    activation: str,
    keys_scale: Tensor | None = None,
    values_scale: Tensor | None = None,
) -> Tensor:
    cache = {"keys": keys, "values": values, "keys_scale": keys_scale, "values_scale": values_scale}
    _check_devices("w8a8_decoder_layer_", "x", x, norm=norm, cos=cos, sin=sin, mask=mask, **cache)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("sq::rms_norm_quantize")
def _(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    a_scale: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("rms_norm_quantize", "x", x, weight=weight, residual=residual, a_scale=a_scale)
    return *_quantized(x, dtype), x.new_empty((0,) if residual is None else x.shape)


@torch.library.register_fake("sq::layer_norm_quantize")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    a_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("layer_norm_quantize", "x", x, weight=weight, bias=bias, residual=residual, a_scale=a_scale)
    return *_quantized(x, dtype), x.new_empty((0,) if residual is None else x.shape)


@torch.library.register_fake("sq::silu_mul_quantize")
def _(gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_devices("silu_mul_quantize", "gate", gate, up=up, a_scale=a_scale)
    return _quantized(gate, dtype)


@torch.library.register_fake("sq::gelu_mul_quantize")
def _(
    gate: Tensor, up: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    _check_devices("gelu_mul_quantize", "gate", gate, up=up, a_scale=a_scale)
    return _quantized(gate, dtype)


@torch.library.register_fake("sq::gelu_quantize")
def _(x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None, approximate: str = "none") -> tuple[Tensor, Tensor]:
    _check_devices("gelu_quantize", "x", x, a_scale=a_scale)
    return _quantized(x, dtype)


@torch.library.register_fake("sq::relu_quantize")
def _(x: Tensor, dtype: torch.dtype, a_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_devices("relu_quantize", "x", x, a_scale=a_scale)
    return _quantized(x, dtype)


@torch.library.register_fake("sq::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_devices("linear", "x", x, weight=weight, bias=bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("sq::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    _check_devices("rms_norm", "x", x, weight=weight)
    return x.new_empty(x.shape)


@torch.library.register_fake("sq::attention")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    _check_devices("attention", "q", q, k=k, v=v, mask=mask, k_scale=k_scale, v_scale=v_scale)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))
