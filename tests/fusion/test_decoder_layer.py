"""Decoder layers of models as one op: the bits of the single modules, and the way back to them for what is unusual."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import build, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from smoothquant_ext import ops
from smoothquant_ext.fusion.decoder_layer import MOST_ROWS, FusedDecoderLayer, find_place
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.nn.int8_kv_cache import Int8Cache
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.scheme import SCHEMES

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


def quantized(model_type: str = "llama", scheme: str = "int8", dtype: torch.dtype = torch.float32) -> Any:
    # A sliding window keeps keys and values in another way.
    model = build(model_type, **({"sliding_window": None} if model_type == "mistral" else {})).to(dtype)
    return quantize(model, token_ids(), Recipe(scheme), progress=False)


def layer_by_layer(model: Any) -> Any:
    """The same model without whole layers."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.__class__ = type(layer).__mro__[2]  # the class before FusedDecoderLayer was mixed in
        assert not isinstance(layer, FusedDecoderLayer)
    return plain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every call of the op."""
    seen: list[Tensor] = []
    op = ops.w8a8_decoder_layer_
    monkeypatch.setattr(ops, "w8a8_decoder_layer_", lambda x, *rest: seen.append(x) or op(x, *rest))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
@pytest.mark.parametrize("model_type", FAMILY)
@pytest.mark.parametrize("cache_class", [DynamicCache, Int8Cache])
def test_models_of_the_family_have_the_same_bits(
    cache_class: type[DynamicCache], model_type: str, scheme: str, dtype: torch.dtype, calls: list[Tensor]
) -> None:
    model = quantized(model_type, scheme, dtype)
    assert {"model.layers.0", "model.layers.1"} <= set(model.smoothquant_report.fused)
    plain, ids = layer_by_layer(model), token_ids(3, 20, seed=8)
    caches = cache_class(config=model.config), cache_class(config=model.config)
    calls.clear()
    with torch.no_grad():
        for begin, end in ((0, 12), (12, 13), (13, 14), (14, 20)):
            ours, theirs = (
                one(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
                for one, cache in zip((model, plain), caches, strict=True)
            )
            assert torch.equal(ours, theirs)
    assert len(calls) == 4 * 2
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        if cache_class is Int8Cache:
            assert torch.equal(ours.keys_scale, theirs.keys_scale)
            assert torch.equal(ours.values_scale, theirs.values_scale)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["greedy", "beam", "static", "prompt lookup"],
)
def test_generation_is_the_same(options: dict[str, Any]) -> None:
    model = quantized()
    plain, prompt = layer_by_layer(model), token_ids(2 if "prompt_lookup_num_tokens" not in options else 1, 12)
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[0, :4] = 0  # padding on the left
    expected = plain.generate(prompt, attention_mask=mask, max_new_tokens=20, **options)
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=20, **options), expected)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "olmo2", "phi3", "stablelm", "gpt_neox", "opt"])
def test_what_computes_something_else_stays(model_type: str) -> None:
    model = quantized(model_type)
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedDecoderLayer)]
    # Gemma's layers are the family's own, but for the norm's offset and the activation.
    assert bool(fused) == (model_type == "gemma")


class Scaled(nn.Module):
    """An attention whose output is scaled a little: nothing that shapes or names would tell."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.__dict__.update(attention.__dict__)
        self.inner = type(attention).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.inner(self, *args, **kwargs)
        return output * 1.01, weights


def test_a_small_difference_is_seen() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = Scaled(layer.self_attn)
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    parent.set_submodule(name, quantize_linear(linear, None, SCHEMES["int8"]))
    assert not any(name.rpartition(".")[2].isdigit() for name in fuse_(model))


def test_hooks_and_other_layers_are_called(calls: list[Tensor]) -> None:
    model = quantized()
    plain, ids = layer_by_layer(model), token_ids(1, 6)
    layer = model.model.layers[0]

    class Adapter(nn.Module):
        def __init__(self, base: W8A8Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    with torch.no_grad():
        expected = plain(ids).logits
        for module in (layer.self_attn, layer.mlp, layer.input_layernorm, layer.self_attn.o_proj, layer.mlp.up_proj):
            calls.clear()
            seen: list[nn.Module] = []
            handle = module.register_forward_hook(lambda module, _args, _output, seen=seen: seen.append(module))
            assert torch.equal(model(ids).logits, expected)
            handle.remove()
            assert seen == [module]
            assert len(calls) == 1  # the other layer
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
        calls.clear()
        assert torch.equal(model(ids).logits, expected)
        assert len(calls) == 1


def test_other_ways_to_call_go_module_by_module(calls: list[Tensor]) -> None:
    model = quantized()
    plain, ids = layer_by_layer(model), token_ids(1, 6)
    with torch.no_grad():
        expected = plain(ids)
        model(token_ids(MOST_ROWS // 8, 8))
        assert calls
        calls.clear()
        model(token_ids(MOST_ROWS // 8 + 1, 8))
        assert not calls
        calls.clear()
        offloaded = StaticCache(config=model.config, max_cache_len=16, offloading=True)
        assert not any(layer._is_understood(expected.logits, {"unknown": True}) for layer in model.model.layers)
        assert find_place(offloaded, 0, expected.logits, (1, 2, 6, 16), True) is None
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        model.set_attn_implementation("sdpa")
        calls.clear()
        torch.testing.assert_close(model(ids).logits, expected.logits, rtol=1e-3, atol=1e-3)
        assert not calls
        model.set_attn_implementation("eager")
        assert len(model(ids, output_attentions=True).attentions) == 2


def test_copies_and_casts_are_fused_too(calls: list[Tensor]) -> None:
    model, ids = quantized(), token_ids(1, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
        calls.clear()
        assert torch.equal(twin(ids).logits, expected)
        assert len(calls) == 2
        wide, narrow = twin.to(torch.bfloat16), layer_by_layer(model).to(torch.bfloat16)
        assert torch.equal(wide(ids).logits, narrow(ids).logits)
