"""w8a8_experts against the oracle on every CPU ISA, and against the single ops that it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import FLOAT8, FLOATS, Call, assert_same_bits, randn, threads
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda.fallback_experts import experts_one_by_one

on_every_isa = pytest.mark.usefixtures("isa")


def weights(
    experts: int, n: int, k: int, seed: int, dtype: torch.dtype = torch.int8, is_packed: bool = True
) -> tuple[Tensor, Tensor]:
    q, scale = reference.quantize_per_token(randn(experts, n, k, seed=seed), dtype)
    return (ops.prepack_weight(q) if is_packed else q), scale


def layers(
    sizes: tuple[int, int, int, int],
    is_gated: bool = True,
    has_bias: bool = False,
    dtype: torch.dtype = torch.int8,
    is_packed: bool = True,
) -> dict[str, Any]:
    """The layers of experts, by their number, K, the width inside, and N."""
    experts, k, inner, n = sizes
    shapes = [*([(inner, k)] * (2 if is_gated else 1)), (n, inner)]
    made = [weights(experts, *shape, seed, dtype, is_packed) for seed, shape in enumerate(shapes)]
    biases = [randn(experts, rows, seed=seed) for seed, (rows, _) in enumerate(shapes)] if has_bias else None
    return {"weight": [w for w, _ in made], "weight_scale": [scale for _, scale in made], "bias": biases}


def routing(tokens: int, top_k: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Experts, not always distinct, and weights of a token's slots."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, experts, (tokens, top_k), generator=generator),
        torch.rand(tokens, top_k, generator=generator).to(dtype),
    ]


@on_every_isa
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_experts_equal_the_oracle(is_gated: bool, activation: str, is_packed: bool) -> None:
    for tokens, dtype in zip((0, 1, 5, 40), (torch.float32, *FLOATS), strict=True):
        for has_bias in (False, True):
            own = layers((5, 70, 130, 50), is_gated, has_bias, is_packed=is_packed)
            x, chosen = randn(tokens, 70, dtype=dtype), routing(tokens, 2, 5, dtype=dtype)
            y = ops.w8a8_experts(x, *chosen, **own, activation=activation)
            assert_same_bits(y, reference.w8a8_experts(x, *chosen, **own, activation=activation))
            assert_same_bits(experts_one_by_one(x, *chosen, **own, activation=activation), y)


@on_every_isa
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
    own, x, chosen = layers((experts, k, inner, n)), randn(tokens, k, seed=seed), routing(tokens, top_k, experts, seed)
    assert_same_bits(ops.w8a8_experts(x, *chosen, **own), reference.w8a8_experts(x, *chosen, **own))


@on_every_isa
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 130])
def test_experts_in_fp8_are_made_of_the_single_ops(tokens: int, dtype: torch.dtype) -> None:
    own, x = layers((3, 70, 130, 50), has_bias=True, dtype=dtype), randn(tokens, 70, dtype=torch.bfloat16)
    chosen = routing(tokens, 2, 3)
    assert_same_bits(ops.w8a8_experts(x, *chosen, **own), experts_one_by_one(x, *chosen, **own))


@on_every_isa
def test_experts_with_one_scale_each() -> None:
    own, x, chosen = layers((4, 70, 130, 50), is_packed=False), randn(9, 70), routing(9, 3, 4)
    one = own | {"weight_scale": [scale[:, :1].contiguous() for scale in own["weight_scale"]]}
    assert_same_bits(ops.w8a8_experts(x, *chosen, **one), reference.w8a8_experts(x, *chosen, **one))


@on_every_isa
def test_a_token_gives_the_same_bits_in_any_company() -> None:
    own, x, chosen = layers((7, 200, 96, 60)), randn(300, 200, dtype=torch.bfloat16), routing(300, 3, 7)
    together = ops.w8a8_experts(x, *chosen, **own)
    for token in (0, 1, 150, 299):
        alone = ops.w8a8_experts(x[token], *(part[token] for part in chosen), **own)
        assert_same_bits(alone, together[token])


@on_every_isa
def test_more_tokens_than_are_done_together() -> None:
    own, x, chosen = layers((3, 64, 96, 32)), randn(60000, 64, dtype=torch.bfloat16), routing(60000, 2, 3)
    y = ops.w8a8_experts(x, *chosen, **own)
    rows = torch.cat([torch.arange(0, 60000, 997), torch.tensor([59999])])
    assert_same_bits(y[rows], reference.w8a8_experts(x[rows], *(part[rows] for part in chosen), **own))


@on_every_isa
def test_one_expert_that_is_chosen_by_all_is_its_mlp() -> None:
    own, x = layers((1, 70, 130, 50)), randn(11, 70)
    y = ops.w8a8_experts(x, torch.zeros(11, 1, dtype=torch.int64), torch.ones(11, 1), **own)
    single = {name: None if value is None else [each[0] for each in value] for name, value in own.items()}
    assert_same_bits(y, ops.w8a8_mlp(x, **single))


@on_every_isa
def test_slots_without_an_expert_add_nothing() -> None:
    own, x, (index, weight) = layers((4, 70, 130, 50)), randn(6, 70), routing(6, 3, 4)
    index[0], index[1, 1], index[2, 0] = 4, 4, 4
    weight[1, 1] = float("nan")
    y = ops.w8a8_experts(x, index, weight, **own)
    assert_same_bits(y, reference.w8a8_experts(x, index, weight, **own))
    assert_same_bits(y, experts_one_by_one(x, index, weight, **own))
    assert not y[0].any()
    assert_same_bits(y[1], ops.w8a8_experts(x[1], index[1, ::2], weight[1, ::2], **own))


@on_every_isa
def test_leading_shapes_and_strides() -> None:
    own, x, (index, weight) = layers((4, 70, 130, 50)), randn(6, 70), routing(6, 2, 4)
    expected = ops.w8a8_experts(x, index, weight, **own)
    shaped = ops.w8a8_experts(x.reshape(2, 3, 70), index.reshape(2, 3, 2), weight.reshape(2, 3, 2), **own)
    assert_same_bits(shaped, expected.reshape(2, 3, 50))
    strided = ops.w8a8_experts(x.t().contiguous().t(), index.t().contiguous().t(), weight.t().contiguous().t(), **own)
    assert_same_bits(strided, expected)


@on_every_isa
def test_any_number_of_threads_gives_the_same_bits() -> None:
    for experts, tokens, top_k in ((40, 1, 8), (5, 7, 2), (8, 300, 3)):
        own, x, chosen = layers((experts, 200, 300, 100)), randn(tokens, 200), routing(tokens, top_k, experts)
        outputs = []
        for count in (1, 2, 3, 7):
            with threads(count):
                outputs.append(ops.w8a8_experts(x, *chosen, **own))
        assert_same_bits(outputs[0], reference.w8a8_experts(x, *chosen, **own))
        for output in outputs[1:]:
            assert_same_bits(output, outputs[0])


@on_every_isa
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


WEIGHTS, SCALES = [B, B, D], [S, S, DS]


def call(*layers: Any, x: Tensor = X, index: Tensor = INDEX, weight: Tensor = WEIGHT, **more: Any) -> Call:
    return lambda: ops.w8a8_experts(x, index, weight, *(layers or (WEIGHTS, SCALES)), **more)


ERRORS: list[tuple[Call, str]] = [
    (call(x=X.int()), "w8a8_experts: x is int32"),
    (call(index=INDEX.int()), "top_k_index is int32, expected int64"),
    (call(index=INDEX[:2]), r"top_k_index has shape \[2, 2\] and x \[3, 40\]"),
    (call(weight=WEIGHT[:, :1]), r"top_k_weights has shape \[3, 1\] and top_k_index \[3, 2\]"),
    (call(weight=WEIGHT.double()), "top_k_weights is float64"),
    (call(index=INDEX + 3), "top_k_index has 3, expected 0 to 1, or E=2 for no expert"),
    (call(index=INDEX - 1), "top_k_index has -1, expected 0 to 1"),
    (call([B], [S]), r"weight has 1 elements, expected 3 \(gate, up, down\) or 2 \(first, down\)"),
    (call([B[0], D], [S, DS]), r"w8a8_experts: weight\[0\] \(first\) has shape"),
    (call([B[:0], D[:0]], [S[:0], DS[:0]]), r"weight\[0\] \(first\) has 0 experts, expected at least one"),
    (call([B, D[:1]], [S, DS[:1]]), r"weight\[1\] \(down\) has 1 experts, expected E=2 as weight\[0\] has"),
    (call([B, D], [S[0, :7], DS]), r"weight_scale\[0\] \(first\) has 7 elements, expected as many for each of E=2"),
    (call([B, D], [torch.ones(2, 65), DS]), r"weight_scale\[0\] \(first\) has 65 elements, expected one a column"),
    (call([PLAIN, D], [S[0], DS]), r"weight_scale\[0\] \(first\) has 9 elements, expected E=2 or E \* N=18"),
    (call([PLAIN, D], [S.double(), DS]), r"weight_scale\[0\] \(first\) is float64"),
    (call([PLAIN, D], [S, DS], x=X[:, :39]), r"x has K=39, but weight\[0\] \(first\) has K=40"),
    (call([B, torch.ones(2, 5, 8, dtype=torch.int8)], [S, DS]), r"has K=9, but weight\[1\] \(down\) has K=8"),
    (call([B, D], [S]), "weight_scale has 1 elements, but weight has 2"),
    (call(bias=[S, S]), "bias has 2 elements, expected 0 or 3"),
    (call(WEIGHTS, [S, S[:, :8], DS]), r"weight\[1\] \(up\) has N=8, but weight\[0\] \(gate\) has N=9"),
    (call([B, F, D], [S, FS, DS]), r"weight\[1\] \(up\) is float8_e4m3fn, but weight\[0\] \(gate\) is int8"),
    (call(bias=[DS, None, None]), r"bias\[0\] \(gate\) has 10 elements, expected E \* N=18"),
    (call(activation="tanh"), "activation is 'tanh', expected silu, gelu"),
    (call([PLAIN.float(), D], [S, DS]), r"w8a8_experts: weight\[0\] \(first\) is float32"),
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
