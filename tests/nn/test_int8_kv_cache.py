"""The INT8 cache: what the quantizer makes of keys and values, whatever generation does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_testing import assert_same_bits
from tiny import build, token_ids
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from smoothquant_ext import Int8Cache, Recipe, SmoothQuantError, quantize, reference, use_int8_cache_
from smoothquant_ext.nn.attention import IMPLEMENTATION, Int8Heads, attention_forward, use_attention_
from smoothquant_ext.nn.int8_kv_cache import PARTS, Int8Layer


def rounded(x: Tensor) -> Tensor:
    """What the cache makes of keys or values."""
    q, scale = reference.quantize_per_token(x, torch.int8)
    return (q.float() * scale.unsqueeze(-1)).to(x.dtype)


class RoundingLayer(DynamicLayer):
    """The oracle: transformers' own layer in floating point, of keys and values that were quantized and dequantized."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


def rounding_cache(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoundingLayer
    return cache


def test_tokens_that_cannot_be_quantized() -> None:
    layer, keys = Int8Layer(), torch.randn(1, 2, 3, 8)
    keys[0, 0, 1] = 0
    keys[0, 1, 2, 3] = torch.inf
    layer.update(keys, keys)
    assert layer.keys_scale[0, 0, 1] == 1
    assert layer.keys_scale[0, 1].isnan().tolist() == [False, False, True]
    assert not layer.keys[0, 0, 1].any()
    assert not layer.keys[0, 1, 2].any()


def test_bytes() -> None:
    layer = Int8Layer()
    layer.update(torch.randn(2, 3, 100, 64).bfloat16(), torch.randn(2, 3, 100, 64).bfloat16())
    held = sum(getattr(layer, name).numel() * getattr(layer, name).element_size() for name in PARTS)
    assert held == 2 * 3 * 100 * 2 * (64 + 4)


def test_it_takes_no_gradients() -> None:
    keys = torch.randn(1, 1, 3, 4, requires_grad=True)
    with pytest.raises(SmoothQuantError, match=r"no gradients: call the model under torch\.no_grad"):
        Int8Layer().update(keys, keys)
    with torch.no_grad():
        Int8Layer().update(keys, keys)


# --- models ---------------------------------------------------------------------------------------------------------

# Different attentions: grouped, with norms of q and k, with windows in every second layer, packed, without rotation.
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_models_see_the_rounded_keys_and_values(model_type: str) -> None:
    """In whatever pieces the text comes: attention reads the new tokens from the cache too."""
    model, ids = build(model_type), token_ids(2, 24)
    with torch.no_grad():
        cache = rounding_cache(model.config)
        expected = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(6, 1)], 1)
        assert use_attention_(model)
        for pieces in ((24,), (6, 6, 6, 6), (20, 1, 1, 1, 1)):
            ours = Int8Cache(model.config)
            logits = [model(part, past_key_values=ours).logits for part in ids.split(pieces, 1)]
            torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-3)
    kinds = {type(layer) for layer in ours.layers}
    assert kinds == ({Int8Layer, DynamicSlidingWindowLayer} if model_type == "gemma3_text" else {Int8Layer})


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "assistant": {"assistant_model": None, "do_sample": False},
    "prefill in chunks": {"prefill_chunk_size": 5, "do_sample": False},
}


@pytest.mark.parametrize("is_quantized", [False, True], ids=["float", "w8a8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_generation(name: str, is_quantized: bool) -> None:
    """The tokens of the oracle, in batches with padding on the left where that can be."""
    options, rows = dict(OPTIONS[name]), 1 if name in ("prompt lookup", "assistant") else 2
    model = build("llama")
    if is_quantized:
        model = quantize(model, token_ids(), Recipe(), progress=False)
    if "assistant_model" in options:
        options["assistant_model"] = build("llama", seed=3)
    prompt = token_ids(rows, 12)
    mask = torch.ones_like(prompt)
    if rows > 1:
        mask[0, :4] = 0

    def generate(cache: DynamicCache | None) -> Tensor:
        torch.manual_seed(0)
        given = {} if cache is None else {"past_key_values": cache}
        tokens: Tensor = model.generate(prompt, attention_mask=mask, max_new_tokens=20, **given, **options)
        return tokens

    expected = generate(rounding_cache(model.config))
    use_attention_(model)
    cache = Int8Cache(model.config)
    assert torch.equal(generate(cache), expected)
    assert {type(layer) for layer in cache.layers} == {Int8Layer}
    handle = use_int8_cache_(model)
    assert torch.equal(generate(None), expected)
    handle.remove()


def test_it_is_the_default_once_asked_for() -> None:
    model, ids = quantize(build("llama"), token_ids(), Recipe(), progress=False), token_ids(1, 12)
    with torch.no_grad():
        plain = model(ids).past_key_values
        assert not any(type(layer) is Int8Layer for layer in plain.layers)
        handle = use_int8_cache_(model)
        cache = model(ids).past_key_values
        assert [type(layer) for layer in cache.layers] == [Int8Layer, Int8Layer]
        assert model(ids, use_cache=False).past_key_values is None
        # A cache that is passed on becomes one, with what it holds.
        model(ids[:, :1], past_key_values=plain)
        assert [type(layer) for layer in plain.layers] == [Int8Layer, Int8Layer]
        assert_same_bits(plain.layers[0].keys[:, :, :12], cache.layers[0].keys)
        empty = DynamicCache()
        model(ids, past_key_values=empty)
        assert [type(layer) for layer in empty.layers] == [Int8Layer, Int8Layer]
        static = StaticCache(config=model.config, max_cache_len=16)
        model(ids, past_key_values=static)
        assert not any(type(layer) is Int8Layer for layer in static.layers)
    output = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert [type(layer) for layer in output.past_key_values.layers] == [Int8Layer, Int8Layer]
    handle.remove()
    with torch.no_grad():
        assert not any(type(layer) is Int8Layer for layer in model(ids).past_key_values.layers)


def test_what_cannot_have_one_is_told() -> None:
    with pytest.raises(SmoothQuantError, match="BloomForCausalLM cannot have an INT8 cache"):
        use_int8_cache_(build("bloom"))
    with pytest.raises(SmoothQuantError, match="no layer keeps more than its sliding window"):
        use_int8_cache_(build("mistral", sliding_window=8))
    with pytest.raises(SmoothQuantError, match="cannot have an INT8 cache"):
        use_int8_cache_(torch.nn.Linear(2, 2))


def test_other_attention_does_not_take_integers_for_values() -> None:
    model, ids = build("llama"), token_ids(1, 12)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), pytest.raises(SmoothQuantError, match="cannot read an INT8 cache of keys and values"):
            model(ids, past_key_values=Int8Cache(model.config))
    latent = build("deepseek_v3")  # caches what its keys and values are made of
    latent.set_attn_implementation(IMPLEMENTATION)
    with torch.no_grad(), pytest.raises(SmoothQuantError, match="linear cannot read an INT8 cache"):
        latent(ids, past_key_values=Int8Cache(latent.config))
    heads, q = Int8Heads.of(torch.ones(1, 2, 3, 4, dtype=torch.int8), torch.ones(1, 2, 3)), torch.ones(1, 2, 3, 4)
    for unusual in ({"softcap": 5.0}, {"dropout": 0.5}, {"attention_mask": torch.zeros(1, 1, 3, 3)}):
        options: dict[str, Any] = {"attention_mask": None} | unusual
        with pytest.raises(SmoothQuantError, match="Linear wants what attention over an INT8 cache does not compute"):
            attention_forward(torch.nn.Linear(1, 1), q, heads, heads, **options)
    assert heads.shape == (1, 2, 3, 4)
    assert heads.dtype == torch.int8
    for operation in (lambda: heads + 1, lambda: heads[0], lambda: heads.float(), lambda: torch.cat([heads, heads])):
        with pytest.raises(SmoothQuantError, match="INT8 cache"):
            operation()
