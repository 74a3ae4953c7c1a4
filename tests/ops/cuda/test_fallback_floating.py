"""linear and attention through torch alone, against their oracles."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_bounds import check_attention, check_linear
from op_testing import FLOATS, randn
from torch import Tensor

from smoothquant_ext import reference
from smoothquant_ext.ops.cuda.fallback_floating import attention, linear

# B, H, Hkv, T, S, D, Dv
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 9, 3, 1, 300, 64, 64),
    (2, 8, 1, 1, 113, 40, 24),
    (1, 4, 2, 3, 17, 15, 33),
    (1, 2, 1, 9, 57, 8, 8),
    (1, 3, 3, 65, 65, 64, 64),
    (2, 4, 2, 65, 65, 32, 32),
    (2, 4, 2, 30, 40, 80, 96),
    (1, 7, 7, 60, 29, 33, 1),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    b, h, hkv, t, s, d, dv = shape
    return (
        randn(b, h, t, d, dtype=dtype),
        randn(b, hkv, s, d, seed=1, dtype=dtype),
        randn(b, hkv, s, dv, seed=2, dtype=dtype),
    )


def int8_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    q, k, v = inputs(shape, dtype)
    (k, k_scale), (v, v_scale) = (reference.quantize_per_token(x, torch.int8) for x in (k * 3, v))
    return q, k, v, {"k_scale": k_scale, "v_scale": v_scale}


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, **scales: Tensor) -> None:
    arguments = {"q": q, "k": k, "v": v, "mask": mask, "scale": scale, "causal": causal, **scales}
    # Dequantized keys and values are rounded to the dtype of q, and some of torch's kernels round probabilities.
    rounding = torch.finfo(q.dtype).eps / 2
    check_attention(attention(**arguments), reference.attention(**arguments), arguments, rounding)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_oracle(shape: tuple[int, ...]) -> None:
    b, h, _, t, s, d, _ = shape
    for dtype in FLOATS:
        masks = [None, *(randn(*kind, t, s, seed=i) > 0.3 for i, kind in enumerate(((1, 1), (b, 1), (1, h), (b, h))))]
        for mask in masks:
            for causal in (False, True):
                check(*inputs(shape, dtype), mask, 1 / math.sqrt(d), causal)
                q, k, v, scales = int8_inputs(shape, dtype)
                check(q, k, v, mask, 1 / math.sqrt(d), causal, **scales)


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(0, 3),
    heads=st.tuples(st.integers(0, 4), st.integers(1, 5)),
    lengths=st.tuples(st.integers(0, 40), st.integers(0, 60)),
    widths=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    dtype=st.sampled_from(FLOATS),
    causal=st.booleans(),
    int8=st.booleans(),
)
def test_attention_of_any_shape(
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
    y = attention(q, k, v, scale=0.5, causal=causal, **scales)
    if s == 0:
        assert not y.any()
    if y.numel() == 0 or s == 0:
        assert (y.shape, y.dtype) == ((b, t, hkv * group, widths[1]), dtype)
        return
    check(q, k, v, None, 0.5, causal, **scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_query_that_sees_no_key_gives_0(shape: tuple[int, ...]) -> None:
    b, h, _, t, s, _, _ = shape
    for dtype in FLOATS:
        q, k, v = inputs(shape, dtype)
        nothing = torch.zeros(1, 1, t, s, dtype=torch.bool)
        assert not attention(q, k, v, nothing, scale=1.0).any()
        for kind in ((1, 1), (b, h)):
            mask = torch.ones(*kind, t, s, dtype=torch.bool)
            mask[0, 0, t // 2] = False
            y = attention(q, k, v, mask, scale=1.0)
            assert not y[0, t // 2, 0].any()
            check(q, k, v, mask, 1.0, True)
        y = attention(q, k, v, scale=1.0, causal=True)
        assert not y[:, : max(0, t - s)].any()


def test_it_gives_0_whatever_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of torch's kernels give NaN to a query that sees no key."""

    def plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
        return (scale * q @ k.transpose(2, 3)).masked_fill(~attn_mask, -torch.inf).softmax(-1) @ v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
    q, k, v = inputs((2, 4, 2, 5, 3, 8, 8), torch.float32)
    check(q, k, v, None, 0.3, True)
    mask = randn(2, 4, 5, 3) > 0
    mask[1, 2, 1] = False
    check(q, k, v, mask, 0.3, False)


def test_attention_through_any_strides() -> None:
    q, k, v = inputs((2, 6, 2, 20, 30, 32, 48), torch.float32)
    expected = reference.attention(q, k, v, scale=0.2)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    longer = [torch.cat([x, torch.full_like(x, torch.nan)], 2)[:, :, : x.shape[2]] for x in (q, k, v)]  # a cache
    for layout in (by_token, longer, [q, k.expand(2, -1, -1, -1), v]):
        y = attention(*layout, scale=0.2)
        check_attention(y, expected, {"q": q, "k": k, "v": v, "scale": 0.2})
    mask = torch.ones(1, 1, 1, 30, dtype=torch.bool).expand(2, 6, 20, 30)
    check_attention(attention(q, k, v, mask, scale=0.2), expected, {"q": q, "k": k, "v": v, "scale": 0.2})


@pytest.mark.parametrize("causal", [False, True])
def test_compile_takes_attention_without_a_mask(causal: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: attention(q, k, k, scale=0.2, causal=causal), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for t, s in ((7, 7), (5, 5), (1, 9), (4, 9)):  # all of torch's ways: its causal mask, none, and one of ours
        q, k = randn(2, 4, t, 16), randn(2, 2, s, 16, seed=1)
        arguments = {"q": q, "k": k, "v": k, "scale": 0.2, "causal": causal}
        check_attention(compiled(q, k), reference.attention(**arguments), arguments)


@pytest.mark.parametrize("n", [0, 1, 3, 32, 70])
def test_linear_is_a_product(n: int) -> None:
    for shape in ((0, 8), (1, 1), (2, 31), (2, 3, 64), (17, 100), (70,)):
        x, w = randn(*shape, dtype=torch.bfloat16), randn(n, shape[-1], dtype=torch.bfloat16, seed=1)
        for bias in (None, randn(n, dtype=torch.bfloat16, seed=2)):
            check_linear(linear(x, w, bias), reference.linear(x, w, bias), x, w, bias)
    assert linear(x, w).is_contiguous()
