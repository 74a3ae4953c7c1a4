"""Recorded inputs: a block is replayed with the arguments that it had in a pass of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from block_cases import recorded
from tiny_blocks import InPlaceBlock, PairBlock, Stack, batches
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.blocks import Batch, find_blocks, run_model
from smoothquant_ext.quantization.block_inputs import BlockInputRecorder


def seen_by_hooks(model: nn.Module, data: list[Batch]) -> list[dict[str, list[Any]]]:
    """For each batch the leaves of each block's arguments, the first time that it runs."""
    windows = []
    for batch in data:
        seen: dict[str, list[Any]] = {}

        def note(name: str, args: Any, kwargs: Any, seen: dict[str, list[Any]] = seen) -> None:
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves((args, kwargs))]
            seen.setdefault(name, leaves)

        handles = [
            block.register_forward_pre_hook(lambda _m, a, k, name=name, note=note: note(name, a, k), with_kwargs=True)
            for name, block in find_blocks(model).items()
        ]
        run_model(model, batch)
        for handle in handles:
            handle.remove()
        windows.append(seen)
    return windows


def replayed(recorder: BlockInputRecorder, model: nn.Module) -> dict[str, list[list[Any]]]:
    """By block, for each window the leaves of the arguments that it is replayed with."""
    found: dict[str, list[list[Any]]] = {}
    previous: list[list[Tensor]] = []
    for name in recorder.names:
        calls = recorder.calls(name, previous)
        found[name] = [tree_leaves((call.args, call.kwargs)) for call in calls]
        previous = [call.replay(find_blocks(model)[name]) for call in calls]
    return found


def assert_replays(model: nn.Module, data: list[Batch], names: list[str]) -> None:
    recorder = recorded(model, data)
    expected, found = seen_by_hooks(model, data), replayed(recorder, model)
    assert recorder.names == names
    assert recorder.windows == len(data)
    for name in names:
        for window, leaves in enumerate(found[name]):
            wanted = expected[window][name]
            assert len(leaves) == len(wanted)
            for leaf, want in zip(leaves, wanted, strict=True):
                same = torch.equal(leaf, want) if isinstance(want, Tensor) else leaf is want or leaf == want
                assert same, f"{name}, window {window}"


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt_neox", "falcon", "falcon-sequential", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 2])
def test_replays_what_the_model_did(architecture: str, rows: int) -> None:
    model = tiny.build(architecture)
    data = [tiny.token_ids(rows, tokens, seed) for seed, tokens in enumerate((12, 12, 7, 1))]
    assert_replays(model, data, list(find_blocks(model)))


def test_replays_batches_with_padding() -> None:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    data = [{"input_ids": tiny.token_ids(2, 12, seed), "attention_mask": mask.roll(seed, 0)} for seed in range(3)]
    model = tiny.build("llama")
    assert_replays(model, data, list(find_blocks(model)))


def multiply_in_place(x: Tensor) -> Tensor:
    return x.mul_(1.5)


STACKS = {
    "plain": (Stack(), (0, 1, 2)),
    "one block": (Stack(order=(0,), blocks=1), (0,)),
    "two tensors": (Stack(make=PairBlock), (0, 1, 2)),
    "multiplied between": (Stack(between=lambda x: x * 1.5), (0, 1, 2)),
    "multiplied in place between": (Stack(between=multiply_in_place), (0, 1, 2)),
    "a view between": (Stack(between=lambda x: x[..., :]), (0, 1, 2)),
    "block changes its own": (Stack(make=InPlaceBlock), (0, 1, 2)),
    "twice in a row": (Stack(order=(0, 0, 1, 2)), (0, 1, 2)),
    "thrice in a row": (Stack(order=(0, 0, 0, 1, 2)), (0, 1, 2)),
    "round and round": (Stack(order=(0, 1, 2, 0, 1, 2)), (0, 1, 2)),
    "back and forth": (Stack(order=(0, 1, 0, 2, 1)), (0, 1, 2)),
    "in another order": (Stack(order=(2, 0, 1)), (2, 0, 1)),
    "one idle": (Stack(order=(0, 2)), (0, 2)),
}


@pytest.mark.parametrize("wiring", STACKS)
def test_replays_any_wiring(wiring: str) -> None:
    model, order = STACKS[wiring]
    assert_replays(model, batches(), [f"layers.{index}" for index in order])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_blocks_that_are_left_out_in_one_window(missing: int) -> None:
    """What follows a block that does not always run can still be replayed, or is left out."""
    data = batches(4)
    model = Stack(order=lambda ids: (0, 2) if torch.equal(ids, data[missing]) else (0, 1, 2))
    recorder = recorded(model, data)
    expected, found = seen_by_hooks(model, data), replayed(recorder, model)
    assert "layers.0" in found
    assert "layers.1" not in found
    for name, windows in found.items():
        for window, leaves in enumerate(windows):
            assert torch.equal(leaves[0], expected[window][name][0]), f"{name}, window {window}"


def kept(model: nn.Module, data: list[Batch]) -> int:
    """How many tensors are kept in all."""
    return sum(map(len, recorded(model, data)._kept.values()))


@pytest.mark.parametrize("architecture", ["llama", "bloom", "gpt_neox", "falcon-sequential"])
def test_masks_are_kept_once(architecture: str) -> None:
    layers = "n_layer" if architecture == "bloom" else "num_hidden_layers"
    counts = {
        (blocks, windows): kept(tiny.build(architecture, **{layers: blocks}), batches(windows, 2))
        for blocks in (2, 5)
        for windows in (1, 3)
    }
    assert counts[5, 1] == counts[2, 1]
    assert counts[5, 3] == counts[2, 3] == counts[2, 1] + 2  # the embeddings of two windows more


def test_a_mask_for_each_kind_of_layer_is_kept_once() -> None:
    kinds = ["sliding_attention", "full_attention"]
    few, many = (
        kept(tiny.build("gemma3_text", num_hidden_layers=2 * times, layer_types=kinds * times), batches(3, tokens=20))
        for times in (1, 3)
    )
    assert few == many


@pytest.mark.parametrize(
    ("order", "each"),
    [((0, 1, 2), 1), ((0, 0, 1, 2), 2), ((0, 0, 0, 0, 1, 2), 2), ((0, 1, 2, 0, 1, 2, 0, 1, 2), 1)],
    ids=["plain", "twice", "four times", "round and round"],
)
def test_runs_that_are_not_recorded_keep_nothing(order: tuple[int, ...], each: int) -> None:
    """A block behind a repeated one needs its input kept; the repetitions themselves need nothing."""
    assert kept(Stack(order=order), batches(3)) == 3 * each


def test_nothing_is_left_behind_and_nothing_kept_changes() -> None:
    model = Stack(between=multiply_in_place, make=InPlaceBlock)
    recorder = recorded(model, batches())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)
    before = [tensor.clone() for tensors in recorder._kept.values() for tensor in tensors]
    replayed(recorder, model)
    after = [tensor for tensors in recorder._kept.values() for tensor in tensors]
    assert all(map(torch.equal, before, after))


def test_hooks_are_removed_when_the_model_fails() -> None:
    def fail(_x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    model = Stack(between=fail)
    with pytest.raises(SmoothQuantError, match="broken"):
        recorded(model, batches())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.layers)
