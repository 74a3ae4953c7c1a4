"""Products of several weights in one op, w8a8_linear_group and w8a8_mlp, against the oracle on every CPU ISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import FLOAT8, FLOATS, Call, assert_same_bits, randn, threads
from torch import Tensor

from smoothquant_ext import ops, reference

on_every_isa = pytest.mark.usefixtures("isa")


def weight(n: int, k: int, seed: int, dtype: torch.dtype = torch.int8, is_packed: bool = True) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize_per_token(randn(n, k, seed=seed), dtype)
    return (ops.prepack_weight(q) if is_packed else q), scale


# --- several weights of one input -----------------------------------------------------------------------------------


@on_every_isa
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 70),
    k=st.integers(1, 200),
    widths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    is_packed=st.booleans(),
    has_bias=st.lists(st.booleans(), min_size=4, max_size=4),
    is_static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_groups_equal_the_oracle(
    m: int, k: int, widths: list[int], is_packed: bool, has_bias: list[bool], is_static: bool, seed: int
) -> None:
    # A packed weight does not say how many of its columns exist: its scales do, and none is not enough of them.
    weights = [weight(n, k, seed + i, is_packed=is_packed and n > 0) for i, n in enumerate(widths)]
    biases = [randn(n, seed=seed + 9) if has else None for n, has in zip(widths, has_bias, strict=False)]
    arguments = (*zip(*weights, strict=True), biases, torch.tensor([0.02]) if is_static else None, torch.bfloat16)
    x = randn(m, k, seed=seed)
    expected, actual = reference.w8a8_linear_group(x, *arguments), ops.w8a8_linear_group(x, *arguments)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@on_every_isa
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_groups_have_the_bits_of_single_calls(dtype: torch.dtype) -> None:
    weights = [weight(n, 130, seed=n, dtype=dtype) for n in (70, 3, 64)]
    x = randn(2, 5, 130, dtype=torch.bfloat16)
    together = ops.w8a8_linear_group(x, *zip(*weights, strict=True))
    for y, (b, b_scale) in zip(together, weights, strict=True):
        assert y.is_contiguous()
        assert_same_bits(y, ops.w8a8_linear(x, b, b_scale))


# --- a whole MLP ----------------------------------------------------------------------------------------------------


def mlp_layers(
    k: int, inner: int, n: int, is_gated: bool = True, has_bias: bool = False, dtype: torch.dtype = torch.int8
) -> dict[str, Any]:
    shapes = [*([(inner, k)] * (2 if is_gated else 1)), (n, inner)]
    weights = [weight(*shape, seed, dtype) for seed, shape in enumerate(shapes)]
    biases = [randn(rows, seed=seed) for seed, (rows, _) in enumerate(shapes)] if has_bias else None
    return {"weight": [w for w, _ in weights], "weight_scale": [scale for _, scale in weights], "bias": biases}


@on_every_isa
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("m", [0, 1, 5, 40])
def test_mlp_equals_the_oracle(m: int, is_gated: bool, activation: str) -> None:
    for dtype in FLOATS:
        for has_bias in (False, True):
            layers = mlp_layers(70, 130, 50, is_gated, has_bias)
            x = randn(m, 70, dtype=dtype)
            x_scale, down_scale = torch.tensor([0.02]), torch.tensor([0.5])
            for scales in (None, [], [x_scale, down_scale], [None, down_scale], [x_scale, None]):
                y = ops.w8a8_mlp(x, **layers, input_scale=scales, activation=activation)
                assert_same_bits(y, reference.w8a8_mlp(x, **layers, input_scale=scales, activation=activation))


@on_every_isa
@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 40), k=st.integers(1, 150), inner=st.integers(1, 150), n=st.integers(1, 150))
def test_mlp_of_any_shape(m: int, k: int, inner: int, n: int) -> None:
    layers, x = mlp_layers(k, inner, n), randn(m, k)
    assert_same_bits(ops.w8a8_mlp(x, **layers), reference.w8a8_mlp(x, **layers))


@on_every_isa
def test_mlp_in_blocks_of_rows() -> None:
    # More rows than are done together.
    layers, x = mlp_layers(64, 96, 32), randn(1100, 64, dtype=torch.bfloat16)
    assert_same_bits(ops.w8a8_mlp(x, **layers), reference.w8a8_mlp(x, **layers))


@on_every_isa
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_mlp_in_fp8_is_made_of_the_single_ops(dtype: torch.dtype) -> None:
    layers, x = mlp_layers(70, 130, 50, dtype=dtype), randn(9, 70, dtype=torch.bfloat16)
    *first, (down, down_scale) = zip(layers["weight"], layers["weight_scale"], strict=True)
    gate, up = (ops.w8a8_linear(x, *layer) for layer in first)
    q, scale = ops.silu_mul_quantize(gate, up, dtype)
    expected = ops.w8a8_gemm(q, down, scale, down_scale)
    assert_same_bits(ops.w8a8_mlp(x, **layers), expected)


@on_every_isa
def test_mlp_of_strange_rows_touches_no_other() -> None:
    layers, x = mlp_layers(70, 130, 50), randn(6, 70)
    clean = ops.w8a8_mlp(x, **layers)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = ops.w8a8_mlp(x, **layers)
    assert y[[1, 2]].isnan().all()
    assert torch.equal(y[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])


# --- both -----------------------------------------------------------------------------------------------------------


@on_every_isa
def test_any_number_of_threads_gives_the_same_bits() -> None:
    layers = mlp_layers(200, 300, 100)
    group = layers["weight"][:2], layers["weight_scale"][:2]
    for m in (1, 7, 300):
        x = randn(m, 200)
        outputs = []
        for count in (1, 2, 3, 7):
            with threads(count):
                outputs.append((*ops.w8a8_linear_group(x, *group), ops.w8a8_mlp(x, **layers)))
        for output in outputs[1:]:
            for one, other in zip(output, outputs[0], strict=True):
                assert_same_bits(one, other)


X = torch.ones(3, 40)
B, S = weight(9, 40, seed=0)
F, FS = weight(9, 40, seed=0, dtype=torch.float8_e4m3fn)
D, DS = weight(5, 9, seed=0)
WEIGHT, SCALE, NOT_8_BIT = [B, B, D], [S, S, DS], torch.ones(5, 9)
POSITIVE = "expected a positive finite"


def group(*arguments: Any) -> Call:
    return lambda: ops.w8a8_linear_group(X, *arguments)


def mlp(*arguments: Any, **more: Any) -> Call:
    return lambda: ops.w8a8_mlp(X, *arguments, **more)


ERRORS: list[tuple[Call, str]] = [
    (group([], []), "w8a8_linear_group: weight has no elements, expected at least one"),
    (group([B, B], [S]), "w8a8_linear_group: weight_scale has 1 elements, but weight has 2"),
    (group([B], [S], [S, S]), "w8a8_linear_group: bias has 2 elements, expected 0 or 1"),
    (group([B, B], [S, S], [None, DS]), r"w8a8_linear_group: bias\[1\] has 5 elements, expected N=9"),
    (group([B, F], [S, FS]), r"weight\[0\] is int8 and weight\[1\] is float8_e4m3fn, expected one dtype"),
    (group([B, NOT_8_BIT.to(torch.int8)], [S, DS]), r"x has K=40, but weight\[1\] has K=9"),
    (lambda: ops.w8a8_linear_group(X.int(), [B], [S]), "w8a8_linear_group: x is int32"),
    (mlp([B], [S]), r"w8a8_mlp: weight has 1 elements, expected 3 \(gate, up, down\) or 2 \(first, down\)"),
    (mlp([B, D], [S]), "w8a8_mlp: weight_scale has 1 elements, but weight has 2"),
    (mlp([B, D], [S, DS], [S]), "w8a8_mlp: bias has 1 elements, expected 0 or 2"),
    (mlp([B, D], [S, DS], None, [None]), "w8a8_mlp: input_scale has 1 elements, expected 0 or 2"),
    (mlp([B, torch.ones(5, 8, dtype=torch.int8)], [S, DS]), r"act\(first\) has K=9, but weight\[1\] \(down\) has K=8"),
    (mlp([B, D], [S, torch.ones(65)]), r"weight_scale\[1\] \(down\) has 65 elements, expected one a column"),
    (mlp(WEIGHT, [S, S[:8], DS]), r"weight\[1\] \(up\) has N=8, but weight\[0\] \(gate\) has N=9"),
    (mlp([B, F, D], [S, FS, DS]), r"weight\[1\] \(up\) is float8_e4m3fn, but weight\[0\] \(gate\) is int8"),
    (mlp(WEIGHT, SCALE, [DS, None, None]), r"bias\[0\] \(gate\) has 5 elements, expected N=9"),
    (mlp(WEIGHT, SCALE, [None, None, S]), r"bias\[2\] \(down\) has 9 elements, expected N=5"),
    (mlp(WEIGHT, SCALE, None, [S, None]), r"input_scale\[0\] \(gate, up\) has 9 elements, expected 1"),
    (mlp([B, D], [S, DS], None, [S, None]), r"input_scale\[0\] \(first\) has 9 elements, expected 1"),
    (mlp(WEIGHT, SCALE, None, [None, S[0] * 0]), rf"input_scale\[1\] \(down\) is 0, {POSITIVE}"),
    (mlp([B, B, NOT_8_BIT], SCALE), r"w8a8_mlp: weight\[2\] \(down\) is float32"),
    (mlp(WEIGHT, SCALE, activation="tanh"), "activation is 'tanh', expected silu, gelu"),
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
