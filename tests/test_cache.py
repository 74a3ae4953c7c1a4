"""The growing cache: the same tokens as transformers' own, whatever generation does with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import build, token_ids
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from smoothquant_ext.cache import LEAST_ROOM, GrowingLayer, use_growing_cache_


def layer_pair() -> tuple[GrowingLayer, DynamicLayer]:
    return GrowingLayer(), DynamicLayer()


def step(layers: tuple[Any, Any], tokens: int, batch: int = 2, seed: int = 0) -> None:
    """Appends the same to both and compares what they return."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 3, tokens, 8, generator=generator).unbind()
    ours, theirs = (layer.update(keys.clone(), values.clone()) for layer in layers)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert layers[0].get_seq_length() == layers[1].get_seq_length()


def test_it_grows_as_a_dynamic_layer_does() -> None:
    layers = layer_pair()
    buffers = set()
    for index, tokens in enumerate((5, 1, 1, 70, 1, 200, 1, 1, 1)):
        step(layers, tokens, seed=index)
        buffers.add(layers[0].key_buffer.data_ptr())
    assert len(buffers) < 5
    assert layers[0].key_buffer.shape[-2] >= layers[0].get_seq_length()


def test_single_tokens_are_not_copied_again() -> None:
    layer, _ = layers = layer_pair()
    step(layers, 10)
    start = layer.keys.data_ptr()
    for index in range(LEAST_ROOM):
        step(layers, 1, seed=index)
        assert layer.keys.data_ptr() == start
    step(layers, 1)
    assert layer.keys.data_ptr() != start


def test_what_others_put_in_place_is_respected() -> None:
    layers = layer_pair()
    step(layers, 10)
    for layer in layers:
        layer.crop(-4)
    step(layers, 2, seed=1)
    for layer in layers:
        layer.reorder_cache(torch.tensor([1, 1]))
    step(layers, 1, seed=2)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    step(layers, 1, batch=4, seed=3)
    for layer in layers:
        layer.batch_select_indices(torch.tensor([0, 3, 2]))
    step(layers, 3, batch=3, seed=4)
    for layer in layers:
        layer.reset()
    step(layers, 2, batch=1, seed=5)


def test_copies_do_not_share_room() -> None:
    layers = layer_pair()
    step(layers, 10)
    twins = copy.deepcopy(layers)
    step(layers, 1, seed=1)
    step(twins, 1, seed=2)
    step(layers, 1, seed=3)


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
