"""The structure of a model: its blocks with their names, linear layers, consumers, experts and calls."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_blocks import Stack
from torch import nn

from smoothquant_ext.probing.structure import Block, find_structure
from smoothquant_ext.quantization.pipeline import quantize

IDS = tiny.token_ids()
ROUTERS = {"deepseek_v3-moe": "gate", "granitemoe": "router", "mixtral": "gate"}


def test_the_blocks_of_a_mixture() -> None:
    model = tiny.build("qwen2_moe")
    structure = find_structure(model, IDS)
    assert list(structure.blocks) == list(structure.called) == ["model.layers.0", "model.layers.1"]
    block = structure.blocks["model.layers.1"]
    assert block.module is structure.modules["model.layers.1"] is model.model.layers[1]
    attention = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    shared = {f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(block.linears) == {*attention, *shared, "mlp.shared_expert_gate"}
    assert set(block.consumers) == {*block.linears, "mlp.gate", "mlp.experts"}
    assert set(block.experts) == {"mlp.experts"}
    assert structure.experts[block.full_name("mlp.experts")] == block.experts["mlp.experts"]
    assert set(structure.linears) == {
        "lm_head",
        *(b.full_name(name) for b in structure.blocks.values() for name in b.linears),
    }
    assert block.call is not None
    assert block.call.replay(block.module)[0].shape == (2, 12, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", ROUTERS)
def test_routers_and_experts_are_found_in_every_dtype(architecture: str, dtype: torch.dtype) -> None:
    model = tiny.build(architecture, dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # which has an fp64 kernel
    for block in find_structure(model, IDS).blocks.values():
        others = {name.rpartition(".")[2] for name in set(block.consumers) - set(block.linears)}
        assert others == {ROUTERS[architecture], "experts"}


def test_names_within_a_block() -> None:
    module = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    block, whole = Block("layers.1", module), Block("", module)
    assert block.full_name("mlp.up") == "layers.1.mlp.up"
    assert block.local_name("layers.1.mlp.up") == "mlp.up"
    assert block.find("layers.1.mlp.up") is module["mlp"]["up"]
    copy = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})})
    assert block.find("layers.1.mlp.up", copy) is copy["mlp"]["up"]
    assert block.holds("layers.1.mlp.up")
    assert not block.holds("layers.10.mlp.up")
    assert whole.full_name("mlp.up") == whole.local_name("mlp.up") == "mlp.up"
    assert whole.holds("anything")


def test_a_block_that_the_probe_does_not_run_has_no_call() -> None:
    structure = find_structure(Stack(order=(2, 0)), IDS)
    assert structure.called == ("layers.2", "layers.0")
    assert structure.blocks["layers.1"].call is None
    assert list(structure.blocks) == ["layers.0", "layers.1", "layers.2"]


def test_a_model_without_a_list_is_one_block() -> None:
    model = Stack()
    model.layers = nn.Sequential(*model.layers)
    model.forward = lambda input_ids, use_cache=False: model.head(model.layers(model.embed(input_ids)))
    structure = find_structure(model, IDS)
    assert list(structure.blocks) == [""]
    assert set(structure.blocks[""].linears) == set(structure.linears)


def test_blocks_that_are_linear_layers_themselves() -> None:
    """They are converted as layers outside of all blocks are."""
    model = Stack(make=lambda: nn.Linear(40, 40))
    structure = find_structure(model, IDS)
    assert {name: block.linears for name, block in structure.blocks.items()} == {f"layers.{i}": () for i in range(3)}
    with torch.no_grad():
        expected = model(IDS)
        quantize(model, [IDS], progress=False)
        assert float((model(IDS) - expected).norm() / expected.norm()) < 0.05
    assert len(model.smoothquant_report.quantized) == 3
    assert model.smoothquant_report.skipped == {"head": "computes what the model returns"}


def test_shared_parameters_are_noted_under_all_their_names() -> None:
    model = Stack()
    model.layers[1].up.weight = model.layers[0].up.weight
    assert find_structure(model, IDS).tied == {"layers.0.up", "layers.1.up"}
