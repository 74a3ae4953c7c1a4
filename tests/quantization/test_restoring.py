"""A model whose quantization fails is what it was, whatever failed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from discover_once import discover_once as discover_once  # a fixture
from emulated_cuda import emulated_cuda
from torch import nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization import block_quantizer, pipeline
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.resume import SearchState
from smoothquant_ext.quantization.sensitivity import Sensitivity

DATA = [tiny.token_ids(1, 12, seed) for seed in range(5)]
RECIPE = Recipe("int8-static", rounding="clip", clipping="mse", auto_skip=2)


class Everything:
    """All that a model is made of: objects and values."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(name, module, type(module)) for name, module in model.named_modules()]
        self.tensors = [*model.named_parameters(), *model.named_buffers()]
        self.values = [(tensor.detach().clone(), tensor.device, tensor.requires_grad) for _, tensor in self.tensors]
        self.attributes = [self.plain(vars(module)) for _, module, _ in self.modules]
        self.config = copy.deepcopy(vars(model.config))
        self.hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, module, _ in self.modules]

    @staticmethod
    def plain(attributes: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in attributes.items() if not name.startswith("_")}

    def assert_same(self, model: nn.Module) -> None:
        now = Everything(model)
        for (name, module, kind), (other_name, other, other_kind) in zip(self.modules, now.modules, strict=True):
            assert (name, kind) == (other_name, other_kind)
            assert module is other
        for (name, tensor), (other_name, other) in zip(self.tensors, now.tensors, strict=True):
            assert name == other_name
            assert tensor is other
        for (value, device, grad), (other, other_device, other_grad) in zip(self.values, now.values, strict=True):
            assert (device, grad) == (other_device, other_grad)
            assert torch.equal(value, other)
        assert now.attributes == self.attributes
        assert now.config == self.config
        assert now.hooks == self.hooks


def fails(patch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException, after: int) -> None:
    """Makes a function raise at its call number ``after``."""
    original, count = getattr(owner, name), [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise error
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapper)


PLACES: dict[str, tuple[int, str | None]] = {
    "cpu": (80 << 30, None),
    "whole": (80 << 30, "cuda"),
    "block by block": (1 << 20, "cuda"),
}
ERROR, INTERRUPT = RuntimeError("kernel error"), KeyboardInterrupt()
FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "an op in the first block": lambda patch: fails(patch, W8A8Linear, "product", ERROR, 0),
    "the last step of the first block": lambda patch: fails(patch, block_quantizer, "BlockReport", ERROR, 0),
    "the second block": lambda patch: fails(patch, block_quantizer, "smooth_group_", INTERRUPT, 5),
    "the last step of the second block": lambda patch: fails(patch, block_quantizer, "BlockReport", INTERRUPT, 1),
    "the journal": lambda patch: fails(patch, SearchState, "write", SmoothQuantError("disk full"), 1),
    "measuring": lambda patch: fails(patch, Sensitivity, "kl", INTERRUPT, 3),
    "putting layers in place": lambda patch: fails(patch, pipeline, "convert_", INTERRUPT, 0),
    "after fusion": lambda patch: fails(patch, pipeline, "finalize_", ERROR, 0),
    "the very end": lambda patch: fails(patch, SearchState, "remove", INTERRUPT, 0),
}


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("place", PLACES)
def test_the_model_is_what_it_was_and_can_be_quantized_again(
    place: str, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama").train()
    tiny.amplify_outliers(model)
    model.set_attn_implementation("sdpa" if place == "cpu" else "eager")
    model.lm_head.weight.requires_grad_(False)
    memory, device = PLACES[place]
    before = Everything(model)
    with emulated_cuda(memory=memory):
        with monkeypatch.context() as patch:
            FAILURES[failure](patch)
            with pytest.raises((RuntimeError, KeyboardInterrupt, SmoothQuantError)):
                quantize(model, DATA, RECIPE, progress=False, device=device)
        before.assert_same(model)
        if failure == "after fusion":
            expected = quantize(copy.deepcopy(model), DATA, RECIPE, progress=False, device=device)
            quantize(model, DATA, RECIPE, progress=False, device=device)
            assert model.smoothquant_record["blocks"] == expected.smoothquant_record["blocks"]


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("place", ["whole", "block by block"])
def test_memory_that_does_not_suffice_is_one_sentence(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama")
    before = Everything(model)
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmany details")
    with emulated_cuda(memory=PLACES[place][0]), monkeypatch.context() as patch:
        fails(patch, W8A8Linear, "product", full, 9)
        with pytest.raises(SmoothQuantError, match=r"too small for another 20.00 GiB: give shorter windows"):
            quantize(model, DATA, progress=False, device="cuda")
    before.assert_same(model)


@pytest.mark.usefixtures("discover_once")
def test_hooks_of_others_still_run_and_can_be_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = tiny.build("llama"), []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    fails(monkeypatch, pipeline, "fuse_", ERROR, 0)
    with pytest.raises(RuntimeError, match="kernel error"):
        quantize(model, DATA, progress=False)
    runs.clear()
    model(DATA[0])
    assert runs == [1]
    handle.remove()
    model(DATA[0])
    assert runs == [1]
