"""The layers of both growing caches, step by step beside transformers' own: what they hold, and when they copy it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from op_testing import assert_same_bits
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from smoothquant_ext import reference
from smoothquant_ext.nn.attention import Int8Heads
from smoothquant_ext.nn.int8_kv_cache import PARTS, Int8Layer
from smoothquant_ext.nn.kv_cache import LEAST_ROOM, GrowingLayer

Check = Callable[[DynamicLayer, str, Tensor | Int8Heads, Tensor], None]


def is_the_same(layer: DynamicLayer, name: str, got: Tensor | Int8Heads, plain: Tensor) -> None:
    assert isinstance(got, Tensor)
    for tensor in (got, getattr(layer, name)):
        assert_same_bits(tensor, plain)


def is_quantized(layer: DynamicLayer, name: str, got: Tensor | Int8Heads, plain: Tensor) -> None:
    assert isinstance(got, Int8Heads)
    q, scale = reference.quantize_per_token(plain, torch.int8)
    for tensor in (got.q, getattr(layer, name)):
        assert_same_bits(tensor, q)
    for tensor in (got.scale, getattr(layer, f"{name}_scale")):
        assert_same_bits(tensor, scale)


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        make: the layer, empty.
        parts: the tensors that it holds.
        check: compares keys or values, given by the layer and in it, with those of transformers' layer.
    """

    make: type[DynamicLayer]
    parts: tuple[str, ...]
    check: Check


KINDS = {
    "float": Kind(GrowingLayer, ("keys", "values"), is_the_same),
    "int8": Kind(Int8Layer, PARTS, is_quantized),
}


class Pair:
    """A layer of ours and one of transformers', which are done the same to."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.ours, self.theirs = kind, kind.make(), DynamicLayer()

    def __iter__(self) -> Iterator[DynamicLayer]:
        return iter((self.ours, self.theirs))

    def step(self, tokens: int, batch: int = 2, seed: int = 0) -> None:
        """Appends keys and values, with heads of different sizes, as the projections leave them; compares."""
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(batch, tokens, 3, d, generator=generator).transpose(1, 2) for d in (8, 5))
        ours, theirs = (layer.update(keys.clone(), values.clone()) for layer in self)
        for name, got, plain in zip(("keys", "values"), ours, theirs, strict=True):
            self.kind.check(self.ours, name, got, plain)
        assert self.ours.get_seq_length() == self.theirs.get_seq_length()

    def addresses(self) -> tuple[int, ...]:
        return tuple(getattr(self.ours, name).data_ptr() for name in self.kind.parts)


@pytest.fixture(params=KINDS)
def layers(request: pytest.FixtureRequest) -> Pair:
    return Pair(KINDS[request.param])


def test_they_hold_every_token_and_seldom_move(layers: Pair) -> None:
    places = set()
    for index, tokens in enumerate((5, 1, 1, 70, 1, 200, 1, 1, 1)):
        layers.step(tokens, seed=index)
        places.add(layers.addresses())
    assert len(places) < 5


def test_single_tokens_are_not_copied_again(layers: Pair) -> None:
    layers.step(10)
    start = layers.addresses()
    for index in range(LEAST_ROOM):
        layers.step(1, seed=index)
        assert layers.addresses() == start
    layers.step(1)
    assert all(now != then for now, then in zip(layers.addresses(), start, strict=True))


def test_what_generation_does_with_them(layers: Pair) -> None:
    layers.step(10)
    for layer in layers:
        layer.crop(-4)
    layers.step(2, seed=1)
    for layer in layers:
        layer.reorder_cache(torch.tensor([1, 1]))
    layers.step(1, seed=2)
    for layer in layers:
        layer.batch_repeat_interleave(2)
    layers.step(1, batch=4, seed=3)
    for layer in layers:
        layer.batch_select_indices(torch.tensor([0, 3, 2]))
    layers.step(3, batch=3, seed=4)
    for layer in layers:
        layer.crop(-layer.get_seq_length())
    layers.step(3, batch=3, seed=5)
    for layer in layers:
        layer.reset()
    layers.step(2, batch=1, seed=6)


def test_what_generation_does_with_empty_ones(layers: Pair) -> None:
    for layer in layers:
        layer.crop(-1)
        layer.reset()
        layer.reorder_cache(torch.tensor([0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0]))
    layers.step(1)


def test_copies_do_not_share_room(layers: Pair) -> None:
    layers.step(10)
    twins = copy.deepcopy(layers)
    layers.step(1, seed=1)
    twins.step(1, seed=2)
    layers.step(1, seed=3)
