"""The 8-bit module that takes the place of a mixture's experts."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import tiny
import torch
from mixtures import (
    EXPERTS,
    INNER,
    K,
    Mixture,
    N,
    Sorted,
    chosen,
    made,
)
from op_testing import assert_same_bits, randn
from torch import Tensor, nn

from smoothquant_ext import Recipe, quantize
from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.probing.experts import match_experts_layout
from smoothquant_ext.quantization.convert import quantize_experts
from smoothquant_ext.scheme import SCHEMES


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_has_every_expert_by_itself(scheme: str) -> None:
    experts, other = made(scheme, "_bias"), made(scheme, "_bias", "up, gate")
    assert experts.is_packed
    state = experts.state_dict()
    kinds = ("weight", "weight_scale", "bias")
    layers = ("gate_proj", "up_proj", "down_proj")
    assert set(state) == {f"{e}.{layer}.{kind}" for e in range(EXPERTS) for layer in layers for kind in kinds}
    assert state["2.gate_proj.weight"].shape == (INNER, K)
    assert state["2.down_proj.weight_scale"].shape == ((N, 1) if SCHEMES[scheme].weight == "channel" else (1,))
    x, (index, weights) = randn(9, K), chosen(9)
    expected = experts(x, index, weights)
    assert not torch.equal(other(x, index, weights), expected)
    other.load_state_dict(state)
    assert_same_bits(other(x, index, weights), expected)
    with pytest.raises(RuntimeError, match=r"1\.up_proj\.weight"):
        other.load_state_dict({name: value for name, value in state.items() if name != "1.up_proj.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*5\.up_proj\.weight"):
        other.load_state_dict(state | {"5.up_proj.weight": state["1.up_proj.weight"]})


def test_casts_and_copies() -> None:
    experts = made("fp8-static", "_bias")
    x, (index, weights) = randn(9, K), chosen(9)
    expected = experts(x, index, weights)
    for same in (copy.deepcopy(experts), made("fp8-static", "_bias").float()):
        assert_same_bits(same(x, index, weights), expected)
    int8 = made("int8")  # torch does not unpickle FP8 tensors
    assert_same_bits(pickle.loads(pickle.dumps(int8))(x, index, weights), int8(x, index, weights))
    half = copy.deepcopy(experts).half()
    assert half.gate.dtype == torch.float8_e4m3fn
    assert half.gate_scale.dtype == torch.float32
    assert half.gate_bias.dtype == torch.float16
    assert half(x.half(), index, weights.half()).dtype == torch.float16
    assert copy.deepcopy(experts).to("meta").gate.shape == (EXPERTS, INNER, K)
    assert "experts=5" in repr(experts)


def test_gradient_is_that_of_the_dequantized_experts() -> None:
    experts = made("int8", "_bias")
    index, weights = chosen(7)
    index[0, 0] = EXPERTS  # no expert
    x, weights = randn(7, K).requires_grad_(), weights.requires_grad_()
    y = experts(x, index, weights)
    assert_same_bits(y.detach(), experts(x.detach(), index, weights.detach()))
    y.square().sum().backward()
    mixture = Mixture("apart", bias="_bias")
    with torch.no_grad():
        for name, part in (("first", "gate"), ("second", "up"), ("down", "down")):
            for expert in range(EXPERTS):
                getattr(mixture, name)[expert] = experts.dequantized(part, expert, torch.float32)
            getattr(mixture, f"{name}_bias").copy_(getattr(experts, f"{part}_bias"))
    clean, shares = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    masked = torch.where(index == EXPERTS, 0, index)
    (mixture(clean, masked, torch.where(index == EXPERTS, 0.0, shares)) * 2 * y.detach()).sum().backward()
    # The same sums of fp32 numbers in another order.
    torch.testing.assert_close(x.grad, clean.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.grad, shares.grad, rtol=1e-4, atol=1e-3)
    no_token = experts(torch.zeros(0, K, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert no_token.shape == (0, N)


@pytest.mark.parametrize("layout", ["gate, up", "plain"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_computes_what_the_cpu_does(gpu: None, scheme: str, layout: str) -> None:
    bias = "_bias" if layout == "plain" else ""
    for tokens in (1, 9, 40):
        experts, x, (index, weights) = made(scheme, bias, layout), randn(tokens, K), chosen(tokens)
        expected = experts(x, index, weights)
        experts = experts.cuda()
        assert not experts.is_packed
        y = experts(x.cuda(), index.cuda(), weights.cuda()).cpu()
        if experts.scheme.dtype == torch.int8:
            assert_same_bits(y, expected)
        else:
            # An fp8 number is up to 1/8 away from the next: one whose sums were added in another order may be either.
            torch.testing.assert_close(y, expected, rtol=1 / 8, atol=float(expected.abs().mean()) / 8)
        assert_same_bits(experts.cpu()(x, index, weights), expected)


@pytest.mark.parametrize("bias", ["", "_bias"])
def test_a_gpu_takes_tokens_sorted_by_expert(gpu: None, bias: str) -> None:
    module = Sorted(bias=bias)
    reading = match_experts_layout(module)
    assert reading is not None
    experts, x = quantize_experts(module, reading, SCHEMES["int8"]), randn(EXPERTS * 7, K)
    x[3] = x[20] = 0  # as of tokens that went to other experts
    expected = experts(x)
    assert_same_bits(experts.cuda()(x.cuda()).cpu(), expected)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_of_models_have_the_same_bits_on_a_gpu(gpu: None, model_type: str) -> None:
    """Given the same inputs: what stands between them may round in another way."""
    model, ids = tiny.build(model_type), tiny.token_ids(seed=9)
    quantize(model, [tiny.token_ids(seed=2)], Recipe(only=("experts",)), progress=False)
    on_cpu = {name: module for name, module in model.named_modules() if isinstance(module, W8A8Experts)}
    there, calls = copy.deepcopy(model).cuda(), []

    def compare(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, name: str = "") -> None:
        assert_same_bits(output.cpu(), on_cpu[name](*(each.cpu() for each in arguments)), name)
        calls.append(name)

    for name in on_cpu:
        there.get_submodule(name).register_forward_hook(functools.partial(compare, name=name))
    with torch.no_grad():
        there(ids.cuda())
    assert len(calls) == len(on_cpu) == 2
