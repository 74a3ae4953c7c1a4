"""The attention op against its oracle, on every CPU ISA."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_bounds import check_attention
from op_testing import FLOATS, ISAS, cpu_isa, randn, threads
from torch import Tensor

from smoothquant_ext import ops, reference

# B, H, Hkv, T, S, D, Dv: one query and many, on both sides of every block and chunk of the kernels.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 9, 3, 1, 300, 64, 64),
    (2, 8, 1, 1, 513, 40, 24),
    (1, 4, 2, 3, 17, 15, 33),
    (1, 2, 1, 9, 257, 8, 8),
    (1, 3, 3, 65, 65, 64, 64),
    (2, 4, 2, 130, 140, 80, 96),
    (1, 7, 7, 200, 129, 33, 1),
    (1, 40, 5, 31, 31, 128, 128),
    (1, 2, 1, 97, 300, 520, 130),
]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu_isa(request.param):
        yield request.param


def inputs(shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    b, h, hkv, t, s, d, dv = shape
    q, k = randn(b, h, t, d, dtype=dtype), randn(b, hkv, s, d, seed=1)
    return q, (k * size).to(dtype), randn(b, hkv, s, dv, seed=2, dtype=dtype)


def int8_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """q, integers of k and v, and their scales; one key and one value are zeros."""
    q, k, v = inputs(shape, dtype)
    k, v = k * 3, v * torch.logspace(-3, 3, v.shape[2])[:, None]  # scales far apart
    k[..., :1, :], v[..., -1:, :] = 0, 0
    (k, k_scale), (v, v_scale) = (reference.quantize_per_token(x, torch.int8) for x in (k, v))
    return q, k, v, {"k_scale": k_scale, "v_scale": v_scale}


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, **scales: Tensor) -> None:
    arguments = {"q": q, "k": k, "v": v, "mask": mask, "scale": scale, "causal": causal, **scales}
    check_attention(ops.attention(**arguments), reference.attention(**arguments), arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(shape: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        for causal in (False, True):
            check(*inputs(shape, dtype), None, 1 / math.sqrt(shape[5]), causal)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks(shape: tuple[int, ...]) -> None:
    b, h, _, t, s, d, _ = shape
    kinds = (1, 1, t, s), (b, 1, t, s), (1, h, t, s), (b, h, t, s)
    for i, (mask_shape, dtype) in enumerate(zip(kinds, (*FLOATS, FLOATS[0]), strict=True)):
        mask = randn(*mask_shape, seed=i) > 0.3
        mask[0, 0, 0] = False  # a query that sees nothing gives 0
        check(*inputs(shape, dtype), mask, 1 / math.sqrt(d), False)
        check(*inputs(shape, dtype), mask, 1 / math.sqrt(d), True)
    for dtype in FLOATS:
        nothing = torch.zeros(1, 1, t, s, dtype=torch.bool)
        assert not ops.attention(*inputs(shape, dtype), nothing, scale=1.0).any()
        # One row of the mask for all queries and keys, through strides of 0.
        check(*inputs(shape, dtype), torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(b, h, t, s), 1.0, False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_keys_and_values(shape: tuple[int, ...]) -> None:
    b, h, _, t, s, d, _ = shape
    mask = randn(b, h, t, s) > 0.3
    mask[0, 0, 0] = False
    for dtype in FLOATS:
        q, k, v, scales = int8_inputs(shape, dtype)
        for own, causal in ((None, False), (None, True), (mask, False), (mask, True)):
            check(q, k, v, own, 1 / math.sqrt(d), causal, **scales)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(0, 3),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    lengths=st.tuples(st.integers(0, 70), st.integers(0, 150)),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(FLOATS),
    causal=st.booleans(),
    int8=st.booleans(),
)
def test_any_shape(
    b: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    causal: bool,
    int8: bool,
) -> None:
    (hkv, group), (t, s) = heads, lengths
    shape = (b, hkv * group, hkv, t, s, *widths)
    q, k, v, scales = int8_inputs(shape, dtype) if int8 else (*inputs(shape, dtype), {})
    if b == 0 or s == 0 or t == 0:
        y = ops.attention(q, k, v, scale=0.5, causal=causal, **scales)
        assert y.shape == (b, t, hkv * group, widths[1])
        assert not y.any()
    else:
        check(q, k, v, None, 1 / math.sqrt(widths[0]), causal, **scales)


@pytest.mark.parametrize("t", [1, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype, t: int) -> None:
    q, k, v = inputs((1, 4, 2, t, 300, 16, 16), dtype, size=500.0)
    check(q, k, v, None, 1.0, False)
    # Almost all the weight is on one key.
    y = ops.attention(q.float(), k.float(), v.float(), scale=100.0)
    best = (q.float() @ k.float().repeat_interleave(2, 1).transpose(2, 3)).argmax(-1)
    expected = v.float().repeat_interleave(2, 1).gather(2, best[..., None].expand(-1, -1, -1, 16)).transpose(1, 2)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_sum_to_one(dtype: torch.dtype) -> None:
    for t in (1, 200):
        q, k, _ = inputs((2, 6, 2, t, 700, 64, 64), dtype)
        y = ops.attention(q, k, torch.ones(2, 2, 700, 64, dtype=dtype), scale=0.125)
        # bf16 rounds each weight, and their errors cancel but for one rounding in the worst case.
        assert float((y.float() - 1).abs().max()) <= (2**-8 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("t", [1, 2, 64, 300])
def test_any_number_of_threads_gives_the_same_bits(t: int) -> None:
    q, k, v = inputs((2, 6, 2, t, 1100, 64, 64), torch.bfloat16)
    outputs = []
    for count in (1, 2, 3, 7):
        with threads(count):
            outputs.append(ops.attention(q, k, v, scale=0.125, causal=True))
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    q, k, v, scales = int8_inputs((2, 6, 2, t, 1100, 64, 64), torch.bfloat16)
    outputs = []
    for count in (1, 2, 3, 7):
        with threads(count):
            outputs.append(ops.attention(q, k, v, scale=0.125, causal=True, **scales))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("padding", [1, 9, 200])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_padding_changes_no_bit(dtype: torch.dtype, padding: int) -> None:
    """A text is attended to alike alone and beside longer ones, whichever way of the kernels takes so many tokens."""
    for tokens in (1, 2, 7, 15, 16, 17, 33, 130, 401):
        total = tokens + padding
        q, k, v = inputs((2, 4, 2, total, total, 40, 24), dtype)
        mask = torch.arange(total).expand(2, 1, total, total) < tokens
        padded = ops.attention(q, k, v, mask, scale=0.2)[:, :tokens]
        alone = ops.attention(*(each[:, :, :tokens] for each in (q, k, v)), scale=0.2)
        assert torch.equal(alone, padded), tokens


@pytest.mark.parametrize("t", [1, 50])
def test_any_strides(t: int) -> None:
    q, k, v = inputs((2, 6, 2, t, 90, 32, 48), torch.float32)
    expected = ops.attention(q, k, v, scale=0.2)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(ops.attention(*by_token, scale=0.2), expected)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(ops.attention(*columns, scale=0.2), expected)
    longer = torch.cat([k, k.new_full((2, 2, 9, 32), torch.nan)], 2)  # a cache that is not full yet
    assert torch.equal(ops.attention(q, longer[:, :, :90], v, scale=0.2), expected)
    one_for_all = ops.attention(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), scale=0.2)
    assert torch.equal(one_for_all[0], expected[0])


@pytest.mark.parametrize("t", [1, 50])
def test_any_strides_of_an_int8_cache(t: int) -> None:
    q, k, v, scales = int8_inputs((2, 6, 2, t, 90, 32, 48), torch.float32)
    expected = ops.attention(q, k, v, scale=0.2, **scales)

    def strided(x: Tensor) -> Tensor:
        every_second = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 77)
        every_second[..., ::2] = x
        return every_second[..., ::2]

    def in_a_buffer(x: Tensor) -> Tensor:  # a cache that is not full yet
        return torch.cat([x, x.new_full((2, 2, 9, *x.shape[3:]), 77)], 2)[:, :, :90]

    def by_token(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    for layout in (strided, in_a_buffer, by_token):
        own = {name: layout(scale) for name, scale in scales.items()}
        assert torch.equal(ops.attention(q, layout(k), layout(v), scale=0.2, **own), expected)
    k, v, *first = (x[:1].expand(2, *x.shape[1:]) for x in (k, v, *scales.values()))
    assert torch.equal(ops.attention(q, k, v, scale=0.2, **dict(zip(scales, first, strict=True)))[0], expected[0])


@pytest.mark.parametrize("t", [1, 50])
def test_a_token_that_was_not_finite_spoils_its_head(t: int) -> None:
    q, k, v, scales = int8_inputs((1, 4, 2, t, 90, 16, 16), torch.float32)
    clean = ops.attention(q, k, v, scale=0.25, **scales)
    for scale in scales.values():
        scale[0, 1, 3] = torch.nan
        y = ops.attention(q, k, v, scale=0.25, **scales)
        assert y[:, :, 2:].isnan().all()
        assert torch.equal(y[:, :, :2], clean[:, :, :2])
        scale[0, 1, 3] = 1.0


def test_what_cannot_be_said_is_not_a_number_and_stays_in_its_head() -> None:
    for t in (1, 50):
        q, k, v = inputs((1, 4, 2, t, 90, 16, 16), torch.float32)
        clean = ops.attention(q, k, v, scale=0.25)
        k[0, 1, 3, 5] = torch.nan
        y = ops.attention(q, k, v, scale=0.25)
        assert y[:, :, 2:].isnan().all()
        assert torch.equal(y[:, :, :2], clean[:, :, :2])
        q[0, 0, 0, 0] = torch.inf
        assert ops.attention(q, k, v, scale=0.25)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("t", [1, 50, 300])
def test_a_query_that_is_not_a_number_gets_no_answer(t: int, causal: bool) -> None:
    for dtype in FLOATS:
        q, k, v = inputs((2, 4, 2, t, t, 32, 32), dtype)
        q[0, 1, t // 2] = torch.nan  # none of its scores is a number
        y = ops.attention(q, k, v, scale=0.25, causal=causal)
        assert y[0, t // 2, 1].isnan().all()
        y[0, t // 2, 1] = 0
        assert y.isfinite().all()


def test_errors_name_the_culprit() -> None:
    q, k, v = inputs((2, 6, 2, 5, 7, 16, 8), torch.float32)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    for arguments, sentence in (
        ((q[0], k, v, None, 1.0), r"q has shape \[6, 5, 16\], expected \[B, heads, length, D\]"),
        ((q.double(), k, v, None, 1.0), "q is float64"),
        ((q, k.half(), v, None, 1.0), "k is float16 and q is float32, expected the same dtype"),
        ((q, k[:1], v, None, 1.0), "k has B=1, but q has B=2"),
        ((q, k[..., :9], v, None, 1.0), "k has D=9, but q has D=16"),
        ((q, k, v[:, :, :3], None, 1.0), r"k has shape \[2, 2, 7, 16\] and v \[2, 2, 3, 8\]"),
        ((q[:, :5], k, v, None, 1.0), "q has 5 heads and k 2, expected a multiple"),
        ((q, k, v, None, 0.0), "scale is 0, expected a positive finite number"),
        ((q, k, v, None, math.nan), "scale is nan"),
        ((q, k, v, mask.float(), 1.0), "mask is float32, expected bool"),
        ((q, k, v, mask[:, :, :4], 1.0), r"mask has shape \[2, 1, 4, 7\], expected \[1 or B, 1 or heads, 5, 7\]"),
    ):
        with pytest.raises(RuntimeError, match=f"attention: {sentence}"):
            ops.attention(*arguments[:4], scale=arguments[4])
    q, k, v, scales = int8_inputs((2, 6, 2, 5, 7, 16, 8), torch.float32)
    own = scales["k_scale"]
    for wrong, sentence in (
        ({"k_scale": None}, "v_scale is given and k_scale is not, expected both or neither"),
        ({"v_scale": None}, "k_scale is given and v_scale is not, expected both or neither"),
        ({"k_scale": own.half()}, "k_scale is float16, expected float32"),
        ({"v_scale": own[..., :6]}, r"v_scale has shape \[2, 2, 6\], expected \[2, 2, 7\]"),
        ({"v_scale": own[..., None]}, r"v_scale has shape \[2, 2, 7, 1\], expected \[2, 2, 7\]"),
        ({"k": k.float()}, "k is float32, expected int8, because it has scales"),
        ({"v": v.float()}, "v is float32, expected int8, because it has scales"),
        ({"k_scale": None, "v_scale": None}, "k is int8 and q is float32, expected the same dtype"),
    ):
        with pytest.raises(RuntimeError, match=f"attention: {sentence}"):
            ops.attention(**{"q": q, "k": k, "v": v, "mask": None, "scale": 1.0} | scales | wrong)  # type: ignore[arg-type]
