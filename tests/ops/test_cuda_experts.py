"""The experts of a mixture on an emulated GPU: their own host code and kernels, on every kind of shape and routing.

INT8 equals the oracle bit for bit. FP8 is within the bound, and has the bits of the kernels of ``w8a8_gemm`` that the
products are made with: each row by itself without tensor cores, or on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_cuda import emulated_cuda
from emulation import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from op_bounds import check_experts
from op_testing import FLOAT8, FLOATS, assert_same_bits, non_contiguous, randn, run_on, threads
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda.fallback_experts import experts_one_by_one

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="module", autouse=True)
def _device() -> Iterator[None]:
    with emulated_cuda(), threads(1):
        yield


def layers(
    sizes: tuple[int, int, int, int],
    is_gated: bool = True,
    has_bias: bool = False,
    dtype: torch.dtype = torch.int8,
) -> dict[str, Any]:
    """The layers of experts, by their number, K, the width inside, and N."""
    experts, k, inner, n = sizes
    shapes = [*([(inner, k)] * (2 if is_gated else 1)), (n, inner)]
    made = [reference.quantize_per_token(randn(experts, *shape, seed=seed), dtype) for seed, shape in enumerate(shapes)]
    biases = [randn(experts, rows, seed=i, dtype=FLOATS[i]) for i, (rows, _) in enumerate(shapes)] if has_bias else None
    return {"weight": [w for w, _ in made], "weight_scale": [scale for _, scale in made], "bias": biases}


def routing(tokens: int, top_k: int, experts: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Experts, not always distinct and sometimes none, and weights of a token's slots."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, experts + 1, (tokens, top_k), generator=generator),
        torch.randn(tokens, top_k, generator=generator).to(dtype),
    ]


def there(*arguments: Any, **keywords: Any) -> Tensor:
    y: Tensor = run_on("cuda", ops.w8a8_experts, *arguments, **keywords)
    return y


def check(x: Tensor, index: Tensor, weights: Tensor, **own: Any) -> None:
    assert_same_bits(there(x, index, weights, **own), reference.w8a8_experts(x, index, weights, **own))


def check_fp8(x: Tensor, index: Tensor, weights: Tensor, **own: Any) -> Tensor:
    arguments = {"x": x, "top_k_index": index, "top_k_weights": weights, **own}
    y = there(**arguments)
    check_experts(y, reference.w8a8_experts(**arguments), arguments)
    return y


# Without tensor cores and on them, in tiles of 32 and of 128 rows; tokens, slots, experts, K, the width inside and N.
SHAPES = [
    (0, 2, 3, 64, 32, 48),
    (5, 0, 3, 64, 32, 48),
    (1, 2, 4, 70, 33, 50),
    (9, 3, 5, 1, 1, 1),
    (40, 2, 3, 70, 130, 50),
    (40, 2, 3, 64, 96, 48),
    (60, 2, 3, 208, 48, 33),
    (70, 4, 2, 64, 32, 136),
    (200, 2, 1, 32, 48, 130),
    (3, 32, 300, 32, 16, 16),
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_the_oracle(shape: tuple[int, ...], arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(arch))
    tokens, top_k, experts, *sizes = shape
    turn = SHAPES.index(shape)
    dtype = FLOATS[turn % 3]
    own = layers((experts, *sizes), turn % 2 == 0, turn % 3 != 0)  # type: ignore[arg-type]
    check(randn(tokens, sizes[0], dtype=dtype), *routing(tokens, top_k, experts, dtype=dtype), **own)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(0, 5),
    experts=st.integers(1, 9),
    k=st.integers(1, 70),
    inner=st.integers(1, 70),
    n=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_shape(tokens: int, top_k: int, experts: int, k: int, inner: int, n: int, seed: int) -> None:
    check(randn(tokens, k, seed=seed), *routing(tokens, top_k, experts, seed), **layers((experts, k, inner, n)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_every_activation(is_gated: bool, activation: str) -> None:
    own = layers((3, 64, 48, 32), is_gated, has_bias=True)
    for tokens in (3, 20):
        check(randn(tokens, 64), *routing(tokens, 2, 3), **own, activation=activation)


@pytest.mark.parametrize("index", [0, 2, 3], ids=["first", "last", "none"])
@pytest.mark.parametrize("tokens", [2, 80])
def test_all_tokens_go_to_one_expert_or_to_none(tokens: int, index: int) -> None:
    own, x = layers((3, 64, 48, 32)), randn(tokens, 64, dtype=torch.bfloat16)
    chosen, weights = torch.full((tokens, 2), index), randn(tokens, 2)
    check(x, chosen, weights, **own)
    if index == 3:
        assert not there(x, chosen, weights * torch.nan, **own).any()


@pytest.mark.parametrize("tokens", [4, 80])
def test_an_index_that_is_no_expert_gives_nan(tokens: int) -> None:
    """And no more: a GPU cannot refuse it without waiting."""
    own, x, (index, weights) = layers((3, 64, 48, 32)), randn(tokens, 64), routing(tokens, 2, 3)
    expected = reference.w8a8_experts(x, index, weights, **own)
    index[1, 0], index[3, 1] = -1, 4
    y = there(x, index, weights, **own)
    wrong = torch.tensor([1, 3])
    assert y[wrong].isnan().all()
    right = torch.arange(tokens)[~torch.isin(torch.arange(tokens), wrong)]
    assert_same_bits(y[right], expected[right])


@pytest.mark.parametrize("tokens", [6, 80])
def test_rows_that_are_not_finite(tokens: int) -> None:
    own, x = layers((3, 64, 48, 32), has_bias=True), randn(tokens, 64, dtype=torch.bfloat16)
    x[1, 3], x[2, 63], x[3] = torch.nan, torch.inf, 0.0
    check(x, *routing(tokens, 2, 3), **own)
    check_fp8(x, *routing(tokens, 2, 3), **layers((3, 64, 48, 32), dtype=torch.float8_e4m3fn))


def test_scales_of_whole_weights_and_weights_of_two_types() -> None:
    for tokens in (5, 40):
        own, x, chosen = layers((3, 64, 48, 32)), randn(tokens, 64), routing(tokens, 2, 3)
        check(x, *chosen, **own | {"weight_scale": [scale[:, :1].contiguous() for scale in own["weight_scale"]]})
        fp8 = layers((3, 64, 48, 32), dtype=torch.float8_e5m2)
        mixed = {name: [*own[name][:2], fp8[name][2]] for name in ("weight", "weight_scale")}
        check_fp8(x, *chosen, **mixed)


def test_leading_shapes_and_strides() -> None:
    own, x, (index, weights) = layers((3, 64, 48, 32)), randn(2, 3, 64), routing(6, 2, 3)
    index, weights = index.reshape(2, 3, 2), weights.reshape(2, 3, 2)
    check(x, index, weights, **own)
    check(x[0, 0], index[0, 0], weights[0, 0], **own)
    expected = reference.w8a8_experts(x, index, weights, **own)
    for layout, strided in non_contiguous(x).items():
        views = [non_contiguous(each)[layout] for each in (index, weights)]
        y = torch.ops.emulated_cuda.back(
            ops.w8a8_experts(*(torch.ops.emulated_cuda.there(each) for each in (strided, *views)), **own_there(own))
        )
        assert_same_bits(y, expected, layout)


def own_there(own: dict[str, Any]) -> dict[str, Any]:
    """Weights that are not contiguous, on the device."""
    strided = {name: [non_contiguous(each)["strided"] for each in own[name]] for name in ("weight", "weight_scale")}
    return {name: [torch.ops.emulated_cuda.there(each) for each in values] for name, values in strided.items()}


def test_a_token_gives_the_same_bits_in_any_company() -> None:
    own, x, chosen = layers((3, 64, 48, 32)), randn(150, 64, dtype=torch.bfloat16), routing(150, 2, 3)
    together = there(x, *chosen, **own)
    for token in (0, 63, 64, 149):
        assert_same_bits(there(x[token], *(part[token] for part in chosen), **own), together[token])


def test_weights_that_are_not_aligned() -> None:
    own, x, chosen = layers((3, 64, 48, 32)), randn(40, 64), routing(40, 2, 3)
    room = torch.zeros(own["weight"][0].numel() + 8, dtype=torch.int8)
    moved = room[8:].view(own["weight"][0].shape).copy_(own["weight"][0])
    device = {"weight": [torch.ops.emulated_cuda.there(moved), *(each.cuda() for each in own["weight"][1:])]}
    rest = {"weight_scale": [each.cuda() for each in own["weight_scale"]]}
    y = ops.w8a8_experts(x.cuda(), *(each.cuda() for each in chosen), **device, **rest)
    assert_same_bits(y, reference.w8a8_experts(x, *chosen, **own))


# --- FP8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize(
    "shape", [(1, 4, 3, 64), (7, 2, 3, 70), (40, 2, 3, 64), (75, 2, 1, 80), (40, 2, 3, 40)], ids=str
)
def test_fp8_has_the_bits_of_single_products_and_is_within_the_bound(
    shape: tuple[int, int, int, int], arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(arch))
    tokens, top_k, experts, k = shape
    own, x = layers((experts, k, 48, 32), has_bias=True, dtype=dtype), randn(tokens, k, dtype=torch.bfloat16)
    chosen = routing(tokens, top_k, experts)
    y = check_fp8(x, *chosen, **own)
    on_tensor_cores = tokens * top_k > 4 * experts and k % 16 == 0 and arch >= 89
    if on_tensor_cores:
        monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", "mma")
    else:
        monkeypatch.setattr("smoothquant_ext.ops.cuda.fallback_experts.w8a8_gemm", row_by_row(ops.w8a8_gemm))
    assert_same_bits(y, run_on("cuda", experts_one_by_one, x, *chosen, **own))


def row_by_row(gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each row of ``a`` by itself: one row is multiplied without tensor cores."""

    def of_rows(a: Tensor, b: Tensor, a_scale: Tensor, *more: object) -> Tensor:
        return torch.cat([gemm(a[i : i + 1], b, a_scale[i : i + 1], *more) for i in range(len(a))])

    return of_rows


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_the_cpu() -> None:
    own, x, (index, weights) = layers((3, 64, 48, 32)), randn(5, 64), routing(5, 2, 3)
    for change, sentence in (
        ({"x": x[:, :63]}, r"x has K=63, but weight\[0\] \(gate\) has K=64"),
        ({"top_k_index": index.int()}, "top_k_index is int32, expected int64"),
        ({"activation": "tanh"}, "activation is 'tanh', expected silu, gelu"),
        ({"weight": [ops.prepack_weight(each) for each in own["weight"]]}, "is packed for the CPU kernels, expected E"),
    ):
        with pytest.raises(RuntimeError, match=f"w8a8_experts: .*{sentence}"):
            there(**{"x": x, "top_k_index": index, "top_k_weights": weights} | own | change)
