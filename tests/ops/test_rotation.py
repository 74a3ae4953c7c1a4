"""``rotate`` of the ops that quantize: what is meant, the oracle's bits on every backend, strange rows, errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import EIGHT_BIT, FLOATS, Call, assert_same_bits, backends, randn, run_on
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.hadamard import BLOCKS, rotate_blocks
from smoothquant_ext.ops.cuda import fallback_quantize as by_torch
from smoothquant_ext.reference.quantize import quantize_with, rotated

EPS = torch.finfo(torch.float32).eps
SCALE = torch.tensor([0.03])
every_block = pytest.mark.parametrize("block", BLOCKS)

# --- what is computed -----------------------------------------------------------------------------------------------


@every_block
def test_the_oracle_multiplies_by_sylvesters_matrix(block: int) -> None:
    """log2(B) sums of at most all magnitudes of a block, the factor and a product are rounded once each."""
    x = randn(7, 3 * block) * torch.logspace(-3, 3, 3 * block)
    values = rotated(x, block)
    magnitude = x.double().abs().unflatten(-1, (3, block)).sum(-1, keepdim=True).expand(7, 3, block).flatten(1)
    bound = (math.log2(block) + 3) * EPS / 2 * magnitude / math.sqrt(block)
    assert bool(((values.double() - rotate_blocks(x.double(), block)).abs() <= bound).all())
    # Back again, an error goes into sqrt(B) values at most and the same roundings are made once more.
    bound = 2 * (math.log2(block) + 4) * EPS / 2 * magnitude
    assert bool(((rotated(values, block) - x).double().abs() <= bound).all())


@every_block
def test_an_outlier_is_spread_over_its_block(block: int) -> None:
    x = torch.zeros(1, 2 * block)
    x[0, block + 5] = 1000
    values = rotated(x, block)
    assert not values[:, :block].any()
    assert (values[:, block:].abs() == values[0, block].abs()).all()
    assert float(values[0, block]) == pytest.approx(1000 / math.sqrt(block))


@every_block
def test_a_rotated_weight_undoes_the_rotation_of_its_input(block: int) -> None:
    """The product is that of plain weights, up to half a quantum of each factor."""
    x, weight = randn(5, 2 * block), randn(9, 2 * block, seed=1)
    x[:, 3] *= 50
    q, scale = reference.quantize_per_token(rotate_blocks(weight, block), torch.int8)
    wide, wide_weight = rotate_blocks(x.double(), block).abs(), rotate_blocks(weight.double(), block).abs()
    x_scale, scales = wide.amax(-1, keepdim=True) / 127, scale.double()
    bound = (wide.sum(-1, keepdim=True) + block * x_scale) * scales / 2 + x_scale / 2 * wide_weight.sum(-1)
    for device in backends():
        y = run_on(device, ops.w8a8_linear, x, q, scale, rotate=block)
        assert bool(((y.double() - x.double() @ weight.double().T).abs() <= 1.001 * bound).all())


# --- bits -----------------------------------------------------------------------------------------------------------


def check(backend: str, x: Tensor, dtype: torch.dtype, block: int, smooth: Tensor | None = None) -> None:
    """Per token and static, on the backend and through torch alone."""
    given: dict[str, Any] = {"x": x, "dtype": dtype, "rotate": block}
    what = (tuple(x.shape), x.dtype, dtype, block)
    expected = reference.quantize_per_token(**given, smooth=smooth)
    for actual in (
        run_on(backend, ops.quantize_per_token, **given, smooth=smooth),
        by_torch.quantize_per_token(**given, smooth=smooth),
    ):
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other, what)
    static = reference.quantize_static(**given, scale=SCALE)
    assert_same_bits(run_on(backend, ops.quantize_static, **given, scale=SCALE), static, what)
    assert_same_bits(by_torch.quantize_static(**given, scale=SCALE), static, what)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_equals_the_oracle_for_every_block(backend: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    for block in BLOCKS:
        for blocks in (1, 2, 3, 7):
            x = randn(5, block * blocks, dtype=x_dtype, seed=blocks)
            for rows in (0, 1, 5):
                check(backend, x[:rows], dtype, block)
            check(backend, x, dtype, block, randn(block * blocks, seed=1).abs() + 0.1)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64), (3, 0), (0,)], ids=str)
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    check(backend, randn(*shape), torch.int8, 16)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_any_magnitude(backend: str, dtype: torch.dtype) -> None:
    """Subnormal sums, and sums of finite values that are not finite."""
    for magnitude in (1e-45, 1e-42, 3e-39, 1e-20, 6e4, 1e20, 5e37, 3e38):
        for x_dtype in FLOATS:
            check(backend, (randn(9, 128).clamp(-1, 1).double() * magnitude).to(x_dtype), dtype, 128)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 4),
    blocks=st.integers(0, 5),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 999),
    exponent=st.integers(-149, 127),
    x_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(EIGHT_BIT),
)
def test_any_input(
    rows: int, blocks: int, block: int, seed: int, exponent: int, x_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x = (randn(rows, blocks * block, seed=seed) * 2.0**exponent).to(x_dtype)
    for device in backends():
        check(device, x, dtype, block)


def test_memory_that_is_not_aligned_or_not_contiguous(backend: str) -> None:
    x = randn(3 * 512 + 1)[1:].view(3, 512)
    for each in (x, randn(512, 3).t(), randn(3, 1024)[:, ::2]):
        check(backend, each, torch.int8, 256)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["per token", "static"])
@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_activations_through_torch_are_rotated_as_by_the_oracle(dtype: torch.dtype, scale: Tensor | None) -> None:
    gate, up = randn(6, 256) * 3, randn(6, 256, seed=1)
    gate[2, 3] = torch.nan
    calls = {
        "silu": (by_torch.silu_mul_quantize, (gate, up), {}),
        "gelu": (by_torch.gelu_mul_quantize, (gate, up), {}),
        "gelu_tanh": (by_torch.gelu_quantize, (gate,), {"approximate": "tanh"}),
        "relu": (by_torch.relu_quantize, (gate,), {}),
    }
    for name, (op, operands, more) in calls.items():
        expected = quantize_with(by_torch.activate(name, *operands), dtype, scale, rotate=128)
        for one, other in zip(op(*operands, dtype, scale, **more, rotate=128), expected, strict=True):
            assert_same_bits(one, other, name)


# --- strange rows ---------------------------------------------------------------------------------------------------


@every_block
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_a_strange_block_marks_its_row_and_no_other(backend: str, strange: float, block: int) -> None:
    """3e38 is finite, but two of it are not. A static scale of the whole tensor touches no other block."""
    clean = randn(5, 3 * block)
    x = clean.clone()
    x[2, block + 1 : block + 3] = strange
    for dtype in EIGHT_BIT:
        (q, scale), (clean_q, clean_scale) = (ops.quantize_per_token(each, dtype, rotate=block) for each in (x, clean))
        assert bool(scale[2].isnan())
        assert not q[2].float().any()
        others = [0, 1, 3, 4]
        assert_same_bits(q[others], clean_q[others])
        assert_same_bits(scale[others], clean_scale[others])
        q, clean_q = (ops.quantize_static(each, SCALE, dtype, block) for each in (x, clean))
        same = torch.ones(5, 3, dtype=torch.bool)
        same[2, 1] = False
        rows, clean_rows = (each.view(torch.int8).unflatten(-1, (3, block))[same] for each in (q, clean_q))
        assert_same_bits(rows, clean_rows)
        check(backend, x, dtype, block)


def test_rows_of_zeros_have_scale_1(backend: str) -> None:
    x = torch.zeros(2, 64)
    x[1] = -0.0
    q, scale = ops.quantize_per_token(x, torch.float8_e4m3fn, rotate=64)
    assert (scale == 1).all()
    assert not q.view(torch.uint8).any()
    check(backend, x, torch.float8_e4m3fn, 64)


# --- errors ---------------------------------------------------------------------------------------------------------

X, W = torch.ones(3, 48), torch.ones(3, 48, dtype=torch.int8)
S = torch.ones(3)
WIDE, DOWN = torch.ones(48, 48, dtype=torch.int8), [torch.ones(48), S]
MIXTURE = (
    X,
    torch.zeros(3, 1, dtype=torch.int64),
    torch.ones(3, 1),
    [WIDE[None], W[None]],
    [each[None] for each in DOWN],
)
CALLS: dict[str, tuple[Any, ...]] = {
    "quantize_per_token": (X, torch.int8, None),
    "quantize_static": (X, SCALE, torch.int8),
    "silu_mul_quantize": (X, X, torch.int8, None),
    "gelu_mul_quantize": (X, X, torch.int8, None, "none"),
    "gelu_quantize": (X, torch.int8, None, "none"),
    "relu_quantize": (X, torch.int8, None),
    "w8a8_linear": (X, W, S, None, None, None, None),
    "w8a8_linear_group": (X, [W, W], [S, S], None, None, None),
    "w8a8_mlp": (X, [WIDE, W], DOWN, None, None, "silu"),
    "w8a8_experts": (*MIXTURE, None, "silu"),
}
ALLOWED = "a power of two from 16 to 256 that divides the 48 values of a row"
OF_TWO_INPUTS = ("w8a8_mlp", "w8a8_experts")
ERRORS: list[tuple[Call, str]] = [
    (
        lambda name=name, rotate=rotate: getattr(ops, name)(*CALLS[name], rotate),
        re.escape(f"{name}: rotate is {rotate}, expected 0 or {ALLOWED}"),
    )
    for name in CALLS
    if name not in OF_TWO_INPUTS
    for rotate in ((-16, 1, 8, 24, 32, 48, 512, 2**40, -(2**63)) if name == "quantize_per_token" else (-1, 32))
]
ERRORS += [
    (lambda name=name, rotate=rotate: getattr(ops, name)(*CALLS[name], rotate), re.escape(f"{name}: {sentence}"))
    for name in OF_TWO_INPUTS
    for rotate, sentence in (
        ([32, 16], f"rotate[0] (first) is 32, expected 0 or {ALLOWED}"),
        ([16, -1], f"rotate[1] (down) is -1, expected 0 or {ALLOWED}"),
        ([16], "rotate has 1 elements, expected 0 or 2"),
    )
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()


@pytest.mark.parametrize("name", CALLS)
def test_what_divides_is_taken(name: str) -> None:
    getattr(ops, name)(*CALLS[name], [16, 16] if name in OF_TWO_INPUTS else 16)
