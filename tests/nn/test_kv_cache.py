"""The growing cache in models: the tokens that transformers' own gives, whatever generation does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import build, token_ids
from transformers import DynamicCache

from smoothquant_ext.nn.kv_cache import GrowingLayer, use_growing_cache_


def test_gradients_flow_through_it() -> None:
    layer = GrowingLayer()
    keys = torch.randn(1, 1, 3, 4, requires_grad=True)
    for _ in range(2):
        result, _ = layer.update(keys, keys)
    result.sum().backward()
    assert keys.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static", "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["greedy", "beam", "sampling", "static", "prompt lookup"],
)
def test_generation_is_the_same(options: dict[str, Any]) -> None:
    model = build("llama")
    prompt = token_ids(1, 12)
    torch.manual_seed(0)
    expected = model.generate(prompt, max_new_tokens=20, **options)
    assert use_growing_cache_(model)
    assert not use_growing_cache_(model)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, max_new_tokens=20, **options), expected)


def test_a_cache_that_is_passed_on_becomes_ours() -> None:
    model = build("llama")
    use_growing_cache_(model)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(token_ids(1, 12), past_key_values=cache, use_cache=True)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer, GrowingLayer]
    assert cache.get_seq_length() == 12
