"""Conversion and the modules it makes: what they compute, how they move, cast, save and pack."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from smoothquant_ext import reference
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.convert import quantize_linear, quantize_weight, static_scale
from smoothquant_ext.scheme import QMAX, SCHEMES, Scheme

ALL = list(SCHEMES.values())


def make(scheme: Scheme, bias: bool = True, k: int = 70, n: int = 33) -> tuple[nn.Linear, W8A8Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias)
    x = torch.randn(5, k)
    return linear, quantize_linear(linear, x.abs().amax(0), scheme), x


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_close_to_the_float_layer(scheme: Scheme, bias: bool) -> None:
    linear, quantized, x = make(scheme, bias)
    y = quantized(x)
    assert y.dtype == x.dtype
    assert y.shape == (5, 33)
    # int8 rounds to half a step of 1/127 of the absmax; e4m3 keeps 3 mantissa bits, e5m2 two: relative 2^-4, 2^-3.
    relative = {torch.int8: 0.5 / 127 * 4, torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[scheme.dtype]
    error = float((y - linear(x)).norm().detach() / linear(x).norm().detach())
    assert 0 < error < 2 * relative


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_output_is_what_the_oracle_says(scheme: Scheme) -> None:
    _, quantized, x = make(scheme)
    expected = reference.w8a8_linear(
        x, quantized.plain_weight(), quantized.weight_scale, quantized.bias, quantized.input_scale
    )
    if scheme.dtype == torch.int8:
        assert torch.equal(quantized(x), expected)
    else:
        torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_weight_is_rounded_to_nearest(scheme: Scheme) -> None:
    weight = torch.randn(9, 40)
    weight[3] = 0
    quantized, scale = quantize_weight(weight, scheme)
    assert quantized.dtype == scheme.dtype
    assert scale.shape == ((9, 1) if scheme.weight == "channel" else (1,))
    error = (quantized.float() * scale - weight).abs()
    if scheme.dtype == torch.int8:
        assert bool((error <= scale / 2 * (1 + 1e-6)).all())
    step = {torch.int8: 0.5, torch.float8_e4m3fn: 16.0, torch.float8_e5m2: 4096.0}[scheme.dtype]
    assert bool((error <= scale * step * (1 + 1e-6)).all())
    if scheme.weight == "channel":
        assert scale[3] == 1.0


def test_static_scale_of_a_dead_input_is_one() -> None:
    assert static_scale(torch.zeros(4), torch.int8).tolist() == [1.0]
    assert static_scale(torch.tensor([1.0, 254.0]), torch.int8).tolist() == [2.0]
    assert static_scale(torch.tensor([448.0]), torch.float8_e4m3fn).tolist() == [448.0 / QMAX[torch.float8_e4m3fn]]


def test_conv1d_becomes_an_ordinary_8_bit_linear() -> None:
    conv = tiny.build("gpt2").transformer.h[0].mlp.c_fc
    x = torch.randn(3, 64)
    quantized = quantize_linear(conv, None, SCHEMES["int8"])
    assert quantized.plain_weight().shape == (256, 64)
    assert float((quantized(x) - conv(x)).norm().detach() / conv(x).norm().detach()) < 0.02


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_state_dict_shows_the_plain_layout_and_round_trips(scheme: Scheme) -> None:
    _, quantized, x = make(scheme)
    assert quantized.is_packed
    state = quantized.state_dict()
    assert state["weight"].shape == (33, 70)
    assert state["weight"].dtype == scheme.dtype
    assert state["weight_scale"].shape == ((33, 1) if scheme.weight == "channel" else (1,))
    assert ("input_scale" in state) == scheme.is_static
    fresh = W8A8Linear(70, 33, True, scheme, dtype=torch.float32)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), quantized(x))  # not packed: packed on the fly, same bits
    fresh.prepack_()
    assert torch.equal(fresh(x), quantized(x))


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_casts_reach_the_bias_alone(scheme: Scheme) -> None:
    _, quantized, x = make(scheme)
    before = copy.deepcopy(quantized.state_dict())
    quantized.to(torch.bfloat16)
    after = quantized.state_dict()
    assert after["bias"].dtype == torch.bfloat16
    for name in before.keys() - {"bias"}:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name].float(), before[name].float())
    assert quantized(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(quantized)(x.bfloat16()).equal(quantized(x.bfloat16()))


def test_leaving_the_cpu_unpacks() -> None:
    _, quantized, _ = make(SCHEMES["fp8-static"])
    assert quantized.is_packed
    quantized.to("meta")
    assert not quantized.is_packed
    assert quantized.weight.shape == (33, 70)
    assert quantized.weight_scale.shape == (1,)


def test_deepcopy_and_repr() -> None:
    _, quantized, _ = make(SCHEMES["int8"])
    assert repr(quantized) == "W8A8Linear(in_features=70, out_features=33, bias=True, scheme=int8, packed=True)"
