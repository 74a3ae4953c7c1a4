"""w8a8_experts against the oracle on every CPU ISA, and against the single ops that it is made of."""

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
from smoothquant_ext.reference.experts import experts_one_by_one

pytestmark = pytest.mark.usefixtures("isa")


def weights(
    experts: int, n: int, k: int, seed: int, dtype: torch.dtype = torch.int8, is_packed: bool = True
) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize_per_token(randn(experts, n, k, seed=seed), dtype)
    return (ops.prepack_weight(q) if is_packed else q), scale


def operands(
    experts: int,
    k: int,
    inner: int,
    n: int,
    is_gated: bool = True,
    has_bias: bool = False,
    dtype: torch.dtype = torch.int8,
    is_packed: bool = True,
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for seed, (name, rows, columns) in enumerate((("gate", inner, k), ("up", inner, k), ("down", n, inner))):
        if name != "up" or is_gated:
            made[name], made[f"{name}_scale"] = weights(experts, rows, columns, seed, dtype, is_packed)
            made[f"{name}_bias"] = randn(experts, rows, seed=seed) if has_bias else None
    return made


def routing(tokens: int, top_k: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Experts, not always distinct, and weights of a token's slots."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, experts, (tokens, top_k), generator=generator),
        torch.rand(tokens, top_k, generator=generator).to(dtype),
    ]


def oracle(x: Tensor, *chosen: Tensor, **others: Any) -> Tensor:
    return experts_one_by_one(reference, x, *chosen, **others)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_experts_equal_the_oracle(is_gated: bool, activation: str, is_packed: bool) -> None:
    for tokens in (0, 1, 5, 40):
        for dtype in FLOATS:
            for has_bias in (False, True):
                own = operands(5, 70, 130, 50, is_gated, has_bias, is_packed=is_packed)
                x = randn(tokens, 70, dtype=dtype)
                chosen = routing(tokens, 2, 5, dtype=dtype)
                y = ops.w8a8_experts(x, *chosen, **own, activation=activation)
                assert_same_bits(y, oracle(x, *chosen, **own, activation=activation))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 70),
    top_k=st.integers(0, 5),
    experts=st.integers(1, 9),
    k=st.integers(1, 150),
    inner=st.integers(1, 150),
    n=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_experts_of_any_shape(tokens: int, top_k: int, experts: int, k: int, inner: int, n: int, seed: int) -> None:
    own, x, chosen = operands(experts, k, inner, n), randn(tokens, k, seed=seed), routing(tokens, top_k, experts, seed)
    assert_same_bits(ops.w8a8_experts(x, *chosen, **own), oracle(x, *chosen, **own))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 130])
def test_experts_in_fp8_are_made_of_the_single_ops(tokens: int, dtype: torch.dtype) -> None:
    own, x = operands(3, 70, 130, 50, has_bias=True, dtype=dtype), randn(tokens, 70, dtype=torch.bfloat16)
    chosen = routing(tokens, 2, 3)
    assert_same_bits(ops.w8a8_experts(x, *chosen, **own), experts_one_by_one(ops, x, *chosen, **own))


def test_experts_with_one_scale_each() -> None:
    own, x, chosen = operands(4, 70, 130, 50, is_packed=False), randn(9, 70), routing(9, 3, 4)
    one = {name: value[:, :1].contiguous() if name.endswith("scale") else value for name, value in own.items()}
    assert_same_bits(ops.w8a8_experts(x, *chosen, **one), oracle(x, *chosen, **one))


def test_a_token_gives_the_same_bits_in_any_company() -> None:
    own, x, chosen = operands(7, 200, 96, 60), randn(300, 200, dtype=torch.bfloat16), routing(300, 3, 7)
    together = ops.w8a8_experts(x, *chosen, **own)
    for token in (0, 1, 150, 299):
        alone = ops.w8a8_experts(x[token], *(part[token] for part in chosen), **own)
        assert_same_bits(alone, together[token])


def test_more_tokens_than_are_done_together() -> None:
    own, x, chosen = operands(3, 64, 96, 32), randn(60000, 64, dtype=torch.bfloat16), routing(60000, 2, 3)
    y = ops.w8a8_experts(x, *chosen, **own)
    rows = torch.cat([torch.arange(0, 60000, 997), torch.tensor([59999])])
    assert_same_bits(y[rows], oracle(x[rows], *(part[rows] for part in chosen), **own))


def test_one_expert_that_is_chosen_by_all_is_its_mlp() -> None:
    own, x = operands(1, 70, 130, 50), randn(11, 70)
    y = ops.w8a8_experts(x, torch.zeros(11, 1, dtype=torch.int64), torch.ones(11, 1), **own)
    single = {name: None if value is None else value[0] for name, value in own.items()}
    assert_same_bits(y, ops.w8a8_mlp(x, **single))


def test_slots_without_an_expert_add_nothing() -> None:
    own, x, (index, weight) = operands(4, 70, 130, 50), randn(6, 70), routing(6, 3, 4)
    index[0], index[1, 1], index[2, 0] = 4, 4, 4
    weight[1, 1] = float("nan")
    y = ops.w8a8_experts(x, index, weight, **own)
    assert_same_bits(y, oracle(x, index, weight, **own))
    assert not y[0].any()
    assert_same_bits(y[1], ops.w8a8_experts(x[1], index[1, ::2], weight[1, ::2], **own))


def test_strange_tokens_touch_no_other() -> None:
    own, x, chosen = operands(4, 70, 130, 50), randn(6, 70), routing(6, 2, 4)
    clean = ops.w8a8_experts(x, *chosen, **own)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    y = ops.w8a8_experts(x, *chosen, **own)
    assert y[[1, 2]].isnan().all()
    assert torch.equal(y[[0, 3, 4, 5]], clean[[0, 3, 4, 5]])


def test_leading_shapes_and_strides() -> None:
    own, x, (index, weight) = operands(4, 70, 130, 50), randn(6, 70), routing(6, 2, 4)
    expected = ops.w8a8_experts(x, index, weight, **own)
    shaped = ops.w8a8_experts(x.reshape(2, 3, 70), index.reshape(2, 3, 2), weight.reshape(2, 3, 2), **own)
    assert_same_bits(shaped, expected.reshape(2, 3, 50))
    strided = ops.w8a8_experts(x.t().contiguous().t(), index.t().contiguous().t(), weight.t().contiguous().t(), **own)
    assert_same_bits(strided, expected)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for experts, tokens, top_k in ((40, 1, 8), (5, 7, 2), (8, 300, 3)):
        own, x, chosen = operands(experts, 200, 300, 100), randn(tokens, 200), routing(tokens, top_k, experts)
        outputs = []
        for count in (1, 2, 3, 7):
            with threads(count):
                outputs.append(ops.w8a8_experts(x, *chosen, **own))
        assert_same_bits(outputs[0], oracle(x, *chosen, **own))
        for output in outputs[1:]:
            assert_same_bits(output, outputs[0])


def test_packing_several_weights_packs_each() -> None:
    for dtype in (torch.int8, *FLOAT8):
        plain, _ = weights(3, 70, 100, 0, dtype, is_packed=False)
        each = torch.stack([ops.prepack_weight(weight).view(torch.int8) for weight in plain])
        assert torch.equal(ops.prepack_weight(plain).view(torch.int8), each)


X = torch.ones(3, 40)
INDEX, WEIGHT = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
B, S = weights(2, 9, 40, seed=0)
F, FS = weights(2, 9, 40, seed=0, dtype=torch.float8_e4m3fn)
D, DS = weights(2, 5, 9, seed=0)
PLAIN, _ = weights(2, 9, 40, seed=0, is_packed=False)


def call(*others: Any, x: Tensor = X, index: Tensor = INDEX, weight: Tensor = WEIGHT, **more: Any) -> Call:
    return lambda: ops.w8a8_experts(x, index, weight, *(others or (B, S, D, DS)), **more)


ERRORS: list[tuple[Call, str]] = [
    (call(x=X.int()), "w8a8_experts: x is int32"),
    (call(index=INDEX.int()), "top_k_index is int32, expected int64"),
    (call(index=INDEX[:2]), r"top_k_index has shape \[2, 2\] and x \[3, 40\]"),
    (call(weight=WEIGHT[:, :1]), r"top_k_weights has shape \[3, 1\] and top_k_index \[3, 2\]"),
    (call(weight=WEIGHT.double()), "top_k_weights is float64"),
    (call(index=INDEX + 3), "top_k_index has 3, expected 0 to 1, or E=2 for no expert"),
    (call(index=INDEX - 1), "top_k_index has -1, expected 0 to 1"),
    (call(B[0], S, D, DS), "w8a8_experts: gate has shape"),
    (call(B[:0], S[:0], D[:0], DS[:0]), "gate has 0 experts, expected at least one"),
    (call(B, S, D[:1], DS[:1]), "down has 1 experts, expected E=2 as gate has"),
    (call(B, S[0, :7], D, DS), "gate_scale has 7 elements, expected as many for each of E=2"),
    (call(B, torch.ones(2, 65), D, DS), "gate_scale has 65 elements, expected one a column"),
    (call(PLAIN, S[0], D, DS), r"gate_scale has 9 elements, expected E=2 or E \* N=18"),
    (call(PLAIN, S.double(), D, DS), "gate_scale is float64"),
    (call(PLAIN, S, D, DS, x=X[:, :39]), "x has K=39, but gate has K=40"),
    (call(B, S, torch.ones(2, 5, 8, dtype=torch.int8), DS), "has K=9, but down has K=8"),
    (call(B, S, D, DS, B), "expected up and up_scale both or neither"),
    (call(up_bias=S), "up_bias is given without up"),
    (call(B, S, D, DS, B, S[:, :8]), "up has N=8, but gate has N=9"),
    (call(B, S, D, DS, F, FS), "up is float8_e4m3fn, but gate is int8"),
    (call(gate_bias=DS), r"gate_bias has 10 elements, expected E \* N=18"),
    (call(activation="tanh"), "activation is 'tanh', expected silu, gelu"),
    (call(PLAIN.float(), S, D, DS), "w8a8_experts: gate is float32"),
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_opcheck() -> None:
    x, (index, weight) = randn(2, 3, 40, dtype=torch.bfloat16), routing(6, 2, 2)
    index, weight = index.reshape(2, 3, 2), weight.reshape(2, 3, 2)
    bias = randn(2, 9)
    op = torch.ops.sq.w8a8_experts.default
    torch.library.opcheck(op, (x, index, weight, B, S, D, DS))
    torch.library.opcheck(op, (x, index, weight, PLAIN, S, D, DS, B, S, bias, bias, bias[:, :5], "gelu"))
    torch.library.opcheck(torch.ops.sq.prepack_weight.default, (PLAIN,))


def test_compile_makes_one_graph_for_every_number_of_tokens() -> None:
    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return ops.w8a8_experts(x, index, weight, B, S, D, DS, B, S).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (6, 7, 11):
        arguments = randn(tokens, 40, seed=tokens), *routing(tokens, 3, 2)
        assert torch.equal(compiled(*arguments), forward(*arguments))
    assert counter.frame_count == 1
