"""A call of an op leaves no memory behind: lists, text and optional arguments are copied on their way in."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from op_cases import Call, randn, random_int8
from torch import Tensor

from smoothquant_ext import ops

LIBC = ctypes.CDLL("libc.so.6")
X, X16 = randn(2, 64), randn(2, 64, dtype=torch.bfloat16)
B = ops.prepack_weight(random_int8(64, 64))
B_SCALE, BIAS, ONE, CHANNELS = torch.ones(64, 1), torch.zeros(64), torch.ones(1), torch.ones(64)
B3, S3 = ops.prepack_weight(random_int8(3, 64, 64)), torch.ones(3, 64)
INDEX = torch.tensor([[0, 2], [2, 2]])
HEADS = randn(1, 2, 4, 16)
MASK = torch.ones(1, 1, 4, 4, dtype=torch.bool)


def decoder_layer() -> Tensor:
    angles = torch.ones(1, 2, 16)
    cache = torch.zeros(1, 4, 8, 16)
    return ops.w8a8_decoder_layer_(
        X[None], CHANNELS, CHANNELS, 1e-5, 1e-5, 0.0, [B] * 7, [B_SCALE] * 7, [], [], angles, angles, cache,
        cache.clone(), 0, None, 0.25, True, "silu",
    )  # fmt: skip


def refused() -> None:
    with pytest.raises(RuntimeError):
        ops.gelu_quantize(X, torch.int8, None, "nonsense")


CALLS: dict[str, Call] = {
    "quantize_per_token": lambda: ops.quantize_per_token(X, torch.int8, CHANNELS),
    "quantize_static": lambda: ops.quantize_static(X, ONE, torch.int8),
    "w8a8_linear": lambda: ops.w8a8_linear(X, B, B_SCALE, BIAS, ONE, CHANNELS, torch.float32),
    "w8a8_linears": lambda: ops.w8a8_linears(X, [B, B], [B_SCALE, B_SCALE], [BIAS, BIAS]),
    "w8a8_mlp": lambda: ops.w8a8_mlp(X, B, B_SCALE, B, B_SCALE, B, B_SCALE),
    "w8a8_experts": lambda: ops.w8a8_experts(X, INDEX, X[:, :2], B3, S3, B3, S3, B3, S3, S3, S3, S3),
    "w8a8_decoder_layer_": decoder_layer,
    "rms_norm_quantize": lambda: ops.rms_norm_quantize(X, CHANNELS, 1e-5, torch.int8, X, ONE),
    "layer_norm_quantize": lambda: ops.layer_norm_quantize(X, CHANNELS, CHANNELS, 1e-5, torch.int8, X, ONE),
    "silu_mul_quantize": lambda: ops.silu_mul_quantize(X, X, torch.int8, ONE),
    "gelu_mul_quantize": lambda: ops.gelu_mul_quantize(X, X, torch.int8, None, "tanh"),
    "gelu_quantize": lambda: ops.gelu_quantize(X, torch.int8, None, "tanh"),
    "relu_quantize": lambda: ops.relu_quantize(X, torch.int8),
    "rms_norm": lambda: ops.rms_norm(X, CHANNELS, 1e-5),
    "linear": lambda: ops.linear(X16, X16, None),
    "attention": lambda: ops.attention(HEADS, HEADS, HEADS, MASK, 0.25),
    "an error": refused,
}


class MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def bytes_in_use() -> int:
    LIBC.mallinfo2.restype = MallInfo
    info = LIBC.mallinfo2()
    return int(info.uordblks + info.hblkhd)


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_memory_behind(name: str) -> None:
    calls = 500
    for _ in range(20):
        CALLS[name]()
    grown = []
    for _ in range(3):  # what grows once was somebody's cache
        gc.collect()
        before = bytes_in_use()
        for _ in range(calls):
            CALLS[name]()
        gc.collect()
        grown.append((bytes_in_use() - before) / calls)
    assert min(grown) < 8  # the allocator's smallest block has 24
