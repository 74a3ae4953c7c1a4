"""Products of several weights in one op, w8a8_linears and w8a8_mlp, against the oracle on every CPU ISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import FLOAT8, FLOATS, Call, assert_same_bits, randn, threads
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from smoothquant_ext import ops, reference

pytestmark = pytest.mark.usefixtures("isa")


def weight(n: int, k: int, seed: int, dtype: torch.dtype = torch.int8, is_packed: bool = True) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize_per_token(randn(n, k, seed=seed), dtype)
    return (ops.prepack_weight(q) if is_packed else q), scale


# --- several weights of one input -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 70),
    k=st.integers(1, 200),
    widths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    is_packed=st.booleans(),
    has_bias=st.booleans(),
    is_static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linears_equal_the_oracle(
    m: int, k: int, widths: list[int], is_packed: bool, has_bias: bool, is_static: bool, seed: int
) -> None:
    # A packed weight does not say how many of its columns exist: its scales do, and none is not enough of them.
    weights = [weight(n, k, seed + i, is_packed=is_packed and n > 0) for i, n in enumerate(widths)]
    biases = [randn(n, seed=seed + 9) for n in widths] if has_bias else []
    x, a_scale = randn(m, k, seed=seed), torch.tensor([0.02]) if is_static else None
    b, b_scale = zip(*weights, strict=True)
    expected = reference.w8a8_linears(x, b, b_scale, biases, a_scale, torch.bfloat16)
    actual = ops.w8a8_linears(x, b, b_scale, biases, a_scale, torch.bfloat16)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_linears_have_the_bits_of_single_calls(dtype: torch.dtype) -> None:
    weights = [weight(n, 130, seed=n, dtype=dtype) for n in (70, 3, 64)]
    x = randn(2, 5, 130, dtype=torch.bfloat16)
    together = ops.w8a8_linears(x, *zip(*weights, strict=True))
    for y, (b, b_scale) in zip(together, weights, strict=True):
        assert y.is_contiguous()
        assert_same_bits(y, ops.w8a8_linear(x, b, b_scale))


# --- a whole MLP ----------------------------------------------------------------------------------------------------


def mlp_operands(
    k: int, inner: int, n: int, is_gated: bool, has_bias: bool = False, dtype: torch.dtype = torch.int8
) -> dict[str, Any]:
    operands: dict[str, Any] = {}
    for seed, (name, rows, columns) in enumerate((("gate", inner, k), ("up", inner, k), ("down", n, inner))):
        if name != "up" or is_gated:
            operands[name], operands[f"{name}_scale"] = weight(rows, columns, seed, dtype)
            operands[f"{name}_bias"] = randn(rows, seed=seed) if has_bias else None
    return operands


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("m", [0, 1, 5, 40])
def test_mlp_equals_the_oracle(m: int, is_gated: bool, activation: str) -> None:
    for dtype in FLOATS:
        for has_bias in (False, True):
            operands = mlp_operands(70, 130, 50, is_gated, has_bias)
            x = randn(m, 70, dtype=dtype)
            for scales in ({}, {"a_scale": torch.tensor([0.02]), "down_a_scale": torch.tensor([0.5])}):
                y = ops.w8a8_mlp(x, **operands, **scales, activation=activation)
                assert_same_bits(y, reference.w8a8_mlp(x, **operands, **scales, activation=activation))


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 40), k=st.integers(1, 150), inner=st.integers(1, 150), n=st.integers(1, 150))
def test_mlp_of_any_shape(m: int, k: int, inner: int, n: int) -> None:
    operands, x = mlp_operands(k, inner, n, is_gated=True), randn(m, k)
    assert_same_bits(ops.w8a8_mlp(x, **operands), reference.w8a8_mlp(x, **operands))


def test_mlp_in_blocks_of_rows() -> None:
    # More rows than are done together.
    operands, x = mlp_operands(64, 96, 32, is_gated=True), randn(1100, 64, dtype=torch.bfloat16)
    assert_same_bits(ops.w8a8_mlp(x, **operands), reference.w8a8_mlp(x, **operands))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_mlp_in_fp8_is_made_of_the_single_ops(dtype: torch.dtype) -> None:
    operands, x = mlp_operands(70, 130, 50, is_gated=True, dtype=dtype), randn(9, 70, dtype=torch.bfloat16)
    gate = ops.w8a8_linear(x, operands["gate"], operands["gate_scale"])
    up = ops.w8a8_linear(x, operands["up"], operands["up_scale"])
    q, scale = ops.silu_mul_quantize(gate, up, dtype)
    expected = ops.w8a8_gemm(q, operands["down"], scale, operands["down_scale"])
    assert_same_bits(ops.w8a8_mlp(x, **operands), expected)


def test_mlp_of_strange_rows_touches_no_other() -> None:
    operands, x = mlp_operands(70, 130, 50, is_gated=True), randn(6, 70)
    clean = ops.w8a8_mlp(x, **operands)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = ops.w8a8_mlp(x, **operands)
    assert y[[1, 2]].isnan().all()
    assert torch.equal(y[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])


# --- both -----------------------------------------------------------------------------------------------------------


def test_any_number_of_threads_gives_the_same_bits() -> None:
    operands = mlp_operands(200, 300, 100, is_gated=True)
    weights = [operands["gate"], operands["up"]], [operands["gate_scale"], operands["up_scale"]]
    for m in (1, 7, 300):
        x = randn(m, 200)
        outputs = []
        for count in (1, 2, 3, 7):
            with threads(count):
                outputs.append((*ops.w8a8_linears(x, *weights), ops.w8a8_mlp(x, **operands)))
        for output in outputs[1:]:
            for one, other in zip(output, outputs[0], strict=True):
                assert_same_bits(one, other)


X = torch.ones(3, 40)
B, S = weight(9, 40, seed=0)
F, FS = weight(9, 40, seed=0, dtype=torch.float8_e4m3fn)
D, DS = weight(5, 9, seed=0)
ERRORS: list[tuple[Call, str]] = [
    (lambda: ops.w8a8_linears(X, [], []), "w8a8_linears: b has no weights, expected at least one"),
    (lambda: ops.w8a8_linears(X, [B, B], [S]), "b_scale has 1 tensors, but b has 2"),
    (lambda: ops.w8a8_linears(X, [B], [S], [S, S]), "bias has 2 tensors, but b has 1"),
    (lambda: ops.w8a8_linears(X, [B, F], [S, FS]), "weights of int8 and float8_e4m3fn, expected one dtype"),
    (lambda: ops.w8a8_linears(X, [B, torch.ones(5, 9, dtype=torch.int8)], [S, DS]), "x has K=40, but b has K=9"),
    (lambda: ops.w8a8_linears(X.int(), [B], [S]), "w8a8_linears: x is int32"),
    (lambda: ops.w8a8_mlp(X, B, S, torch.ones(5, 8, dtype=torch.int8), DS), "has K=9, but down has K=8"),
    (lambda: ops.w8a8_mlp(X, B, S, D, torch.ones(65)), "down_scale has 65 elements, expected one a column"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, B), "w8a8_mlp: expected up and up_scale both or neither"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, up_bias=S), "up_bias is given without up"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, B, S[:8]), "up has N=8, but gate has N=9"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, F, FS), "up is float8_e4m3fn, but gate is int8"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, gate_bias=DS), "gate_bias has 5 elements, expected N=9"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, down_bias=S), "down_bias has 9 elements, expected N=5"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, a_scale=S), "a_scale has 9 elements, expected 1"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, down_a_scale=S[0] * 0), "down_a_scale is 0, expected a positive finite"),
    (lambda: ops.w8a8_mlp(X, B, S, X, DS), "w8a8_mlp: down is float32"),
    (lambda: ops.w8a8_mlp(X, B, S, D, DS, activation="tanh"), "activation is 'tanh', expected silu, gelu"),
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_opcheck() -> None:
    x = randn(2, 3, 40, dtype=torch.bfloat16)
    bias = randn(9)
    sq = torch.ops.sq
    for op, arguments in (
        (sq.w8a8_linears, (x, [B, B], [S, S], [])),
        (sq.w8a8_linears, (x, [B], [S], [bias], torch.ones(1), torch.float32)),
        (sq.w8a8_mlp, (x, B, S, D, DS)),
        (sq.w8a8_mlp, (x, B, S, D, DS, B, S, bias, bias, bias[:5], None, torch.ones(1), "gelu")),
    ):
        torch.library.opcheck(op.default, arguments)


def test_compile_makes_one_graph_for_every_batch_size() -> None:
    def forward(x: Tensor) -> Tensor:
        first, second = ops.w8a8_linears(x, [B, B], [S, S])
        return ops.w8a8_mlp(x, B, S, D, DS, B, S).sum() + first.sum() + second.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for batch, tokens in ((6, 3), (7, 8), (11, 2)):  # the first ones unlike every size of the weights
        x = randn(batch, tokens, 40, seed=batch)
        assert torch.equal(compiled(x), forward(x))
    assert counter.frame_count == 1
