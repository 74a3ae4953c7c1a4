"""How the weights of a module of experts are read, found by running it."""

from __future__ import annotations

import pytest
import tiny
import torch
from mixtures import (
    ACTIVATIONS,
    EXPERTS,
    INNER,
    LAYOUTS,
    Backwards,
    Clamped,
    K,
    Limited,
    Mixture,
    N,
    Ranked,
    Sorted,
    chosen,
    made,
)
from op_testing import assert_same_bits, randn
from torch import nn
from torch.nn.functional import gelu

from smoothquant_ext.probing.experts import agrees, looks_like_experts, match_experts_layout, match_layouts
from smoothquant_ext.probing.linears import find_experts
from smoothquant_ext.quantization.convert import quantize_experts
from smoothquant_ext.scheme import SCHEMES


@pytest.mark.parametrize("bias", ["", "_bias"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, is_transposed: bool, bias: str) -> None:
    for name, activation in ACTIVATIONS.items():
        module = Mixture(layout, activation, is_transposed, bias)
        assert looks_like_experts(module)
        reading = match_experts_layout(module)
        assert reading is not None
        assert reading.activation == name
        assert (reading.up is None) == (layout == "plain")
        assert agrees(module, reading)
        # The 8-bit module is the float one up to 8 bits: no layer is mistaken for another.
        x, (index, weights) = randn(30, K), chosen(30)
        expected = module(x, index, weights)
        actual = quantize_experts(module, reading, SCHEMES["int8"])(x, index, weights)
        assert (actual - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("bias", ["", "_bias"])
def test_experts_whose_tokens_come_sorted(bias: str) -> None:
    module = Sorted("gate, up", is_transposed=True, bias=bias)
    reading = find_experts(nn.ModuleDict({"mlp": module}))["mlp"]
    assert reading is not None
    assert reading.is_sorted
    experts = quantize_experts(module, reading, SCHEMES["int8"])
    x = randn(3 * EXPERTS, K)
    x[::2] = 0  # tokens that are not for this expert
    expected, actual = module(x), experts(x)
    assert (actual - expected).norm() < 0.03 * expected.norm()
    assert bool(bias) or not actual[::2].any()
    assert_same_bits(actual[1:2], experts(x[1:2], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)))
    assert experts(x[:0]).shape == (0, N)
    with pytest.raises(TypeError, match="top_k_index and top_k_weights are missing"):
        made()(x)


def test_modules_are_read_without_their_weights() -> None:
    with torch.device("meta"):
        model = Mixture("interleaved up, gate", gelu)
        torch.set_default_dtype(torch.bfloat16)
        try:
            reading = match_experts_layout(model)
        finally:
            torch.set_default_dtype(torch.float32)
    assert reading is not None
    assert reading.activation == "gelu"
    assert reading.gate.rows == slice(1, None, 2)


def test_modules_of_one_class_and_other_sizes_are_read_anew() -> None:
    wide, narrow = Mixture(), Mixture()
    narrow.first = nn.Parameter(narrow.first.detach()[:, :INNER].clone())
    narrow.down = nn.Parameter(narrow.down.detach()[..., : INNER // 2].clone())
    readings = match_layouts({"wide": wide, "narrow": narrow, "again": wide})
    widths = {name: reading.gate.rows.stop for name, reading in readings.items() if reading is not None}
    assert widths == {"wide": INNER, "narrow": INNER // 2, "again": INNER}


@pytest.mark.parametrize("kind", [Ranked, Clamped, Limited])
def test_what_computes_something_else_is_not_read(kind: type[Mixture]) -> None:
    assert match_experts_layout(kind()) is None


def test_experts_in_another_order_are_seen_with_their_own_weights() -> None:
    # On random weights that all experts share the order does not show.
    module = Backwards()
    assert match_experts_layout(module) is not None
    assert find_experts(nn.ModuleDict({"mlp": module})) == {"mlp": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_are_read_in_every_dtype(dtype: torch.dtype) -> None:
    for name in ("mixtral", "qwen2_moe", "deepseek_v3-moe", "granitemoe"):
        found = find_experts(tiny.build(name, dtype))
        assert len(found) == 2
        assert all(reading is not None and reading.activation == "silu" for reading in found.values())


def test_other_modules_do_not_look_like_experts() -> None:
    modules = dict(tiny.build("llama").named_modules()) | {"convolution": nn.Conv1d(4, 4, 3), "nothing": nn.Module()}
    assert not any(looks_like_experts(module) for module in modules.values())
