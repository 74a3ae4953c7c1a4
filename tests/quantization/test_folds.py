"""Scales of smoothed blocks in the model itself: bit for bit, with scales that are powers of two."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from discover_once import discover_once as discover_once  # a fixture
from torch import nn

from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.channel_code import mapped_channels
from smoothquant_ext.probing.hooks import swapped
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import Structure, find_structure
from smoothquant_ext.quantization.alpha_search import Choice
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.folds import fold_rest_, for_unsmoothed
from smoothquant_ext.quantization.smoothing import fold_, group_modules
from smoothquant_ext.scheme import SCHEMES

IDS = tiny.token_ids()


class Smoothed:
    """A model, a smoothed copy, and 8-bit layers of all linear layers of the copy's blocks."""

    def __init__(self, architecture: str, scheme: str = "int8", dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny.build(architecture, dtype)
        self.smoothed = copy.deepcopy(self.model)
        self.structure = find_structure(self.model, IDS)
        other: Structure = find_structure(self.smoothed, IDS)
        generator = torch.Generator().manual_seed(0)
        self.folds: dict[str, list[Choice]] = {name: [] for name in self.structure.blocks}
        for group in sorted(discover(self.structure).groups, key=lambda group: group.kind != "linear"):
            s = torch.exp2(torch.randint(-3, 4, (group.channels,), generator=generator).float())
            s = torch.where(mapped_channels(group.consumers, group.channels), s, 1.0)
            self.folds[group.block].append(Choice(group, 0.5, s))
            fold_(*group_modules(other.blocks[group.block], group), group, s)
        self.layers: dict[str, W8A8Linear] = {}
        for block in other.blocks.values():
            for local in block.linears:
                linear = block.module.get_submodule(local)
                self.layers[block.full_name(local)] = quantize_linear(linear, torch.tensor(20.0), SCHEMES[scheme])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_layers_fit_in_the_model_before_it_is_smoothed(architecture: str, scheme: str) -> None:
    case = Smoothed(architecture, scheme)
    assert any(case.folds.values())
    fitting = for_unsmoothed(case.structure, case.folds, case.layers)
    assert fitting.keys() == case.layers.keys()
    assert all(fitting[name].weight is layer.weight for name, layer in case.layers.items())
    for some in (list(case.layers), list(case.layers)[::2], [next(iter(case.layers))]):
        with swapped(case.model, {name: fitting[name] for name in some}):
            actual = logits(case.model)
        with swapped(case.smoothed, {name: case.layers[name] for name in some}):
            assert torch.equal(actual, logits(case.smoothed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral", "gemma2"])
def test_what_stays_gets_its_scales(architecture: str, dtype: torch.dtype) -> None:
    case = Smoothed(architecture, dtype=dtype)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    old = dict(case.model.named_parameters())
    replaced = set(list(case.layers)[::2])
    fold_rest_(case.structure, case.folds, replaced)
    after, expected = case.model.state_dict(), case.smoothed.state_dict()
    for name, value in after.items():
        is_replaced = name.rpartition(".")[0] in replaced
        assert torch.equal(value, before[name] if is_replaced else expected[name]), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in old.items())
