"""Rotations at run time: which layers get one, what is quantized then, and that it takes outliers away."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from tiny_w8a8 import layers_of
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from smoothquant_ext import Recipe, quantize, reference
from smoothquant_ext.hadamard import block_size, rotate_blocks
from smoothquant_ext.nn.experts import W8A8Experts, in_floating_point
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.blocks import BlockCall
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization import rotation_choice
from smoothquant_ext.quantization.block_statistics import Windows, collect_statistics
from smoothquant_ext.quantization.online_rotation import find_all, find_online
from smoothquant_ext.quantization.report import Report, Rotations
from smoothquant_ext.reporting.tables import _rotation_lines
from smoothquant_ext.scheme import QMAX

WIDTH, HEAD = 64, 16
DATA = [tiny.token_ids(seed=seed) for seed in range(2, 6)]
IDS = tiny.token_ids(seed=9)

# The last names of the layers behind other matrices, in the architectures that have others than most.
BEHIND = {
    "phi": {"dense", "fc2"},
    "starcoder2": {"o_proj", "c_proj"},
    "opt": {"out_proj", "fc2"},
    "gpt2": {"c_proj"},
    "gpt_neox": {"dense", "dense_4h_to_h"},
    "gpt_neox-sequential": {"dense", "dense_4h_to_h"},
    "gptj": {"out_proj", "fc_out"},
    "bloom": {"dense", "dense_4h_to_h"},
    "mpt": {"out_proj", "down_proj"},
    "falcon": {"dense", "dense_4h_to_h"},
    "falcon-new": {"dense", "dense_4h_to_h"},
    "falcon-sequential": {"dense", "dense_4h_to_h"},
    "deepseek_v2-lite": {"o_proj", "down_proj", "down"},
    "deepseek_v3-moe": {"o_proj", "down_proj", "down"},
    "mixtral": {"o_proj", "down"},
    "qwen3_moe": {"o_proj", "down"},
    "olmoe": {"o_proj", "down"},
    "granitemoe": {"o_proj", "down"},
    "llama4_text": {"o_proj", "down_proj", "down"},
    "qwen2_moe": {"o_proj", "down_proj", "down"},
}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_layers_behind_other_matrices_are_found(architecture: str) -> None:
    model = tiny.build(architecture)
    structure = find_structure(model, DATA[0])
    before = copy.deepcopy(model.state_dict())
    found: dict[str, int] = {}
    for name in structure.called:
        found |= find_online(structure.blocks[name], ())
    assert {name.rpartition(".")[2] for name in found} == BEHIND.get(architecture, {"o_proj", "down_proj"})
    for name, size in found.items():
        of_experts = name.endswith("experts.down")  # 48 wide, or 112
        width = 48 if of_experts else len(tiny.input_columns(model.get_submodule(name)))
        assert size == block_size(width) > 0
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_all_inputs_can_be_rotated(architecture: str) -> None:
    model = tiny.build(architecture)
    structure = find_structure(model, DATA[0])
    for name in structure.called:
        block = structure.blocks[name]
        found = find_all(block, ())
        widths = {local: len(tiny.input_columns(block.module.get_submodule(local))) for local in block.linears}
        layers = {local for local, width in widths.items() if width % 16 == 0}
        experts = {local for each in block.experts for local in (each, f"{each}.down")}
        assert {block.local_name(each) for each in found} == layers | experts
        assert find_online(block, ()).items() <= found.items()


def test_what_is_rotated_already_is_left_out() -> None:
    structure = find_structure(tiny.build("llama"), DATA[0])
    name = structure.called[0]
    assert find_online(structure.blocks[name], [f"{name}.self_attn.o_proj"]) == {f"{name}.mlp.down_proj": HEAD}


def test_widths_without_a_block_are_left_out() -> None:
    structure = find_structure(tiny.build("llama", intermediate_size=108), DATA[0])
    name = structure.called[0]
    assert find_online(structure.blocks[name], ()) == {f"{name}.self_attn.o_proj": WIDTH}


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_layer_is_that_of_the_rotated_input_and_weight(scheme: str, rounding: Any) -> None:
    model = tiny.build("llama")
    inputs: list[Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in DATA:
        tiny.logits(model, batch)
    hook.remove()
    weight = rotate_blocks(down.weight.detach(), HEAD)
    quantize(model, DATA, Recipe(scheme, rounding=rounding, smooth=False, rotate="down"), progress=False)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, W8A8Linear)
    assert layer.rotate == HEAD
    step = layer._plain_scale().max() / (1 if layer.weight.dtype == torch.int8 else 1 / 32)
    assert (layer.plain_weight().float() * layer._plain_scale() - weight).abs().max() <= step * (
        2 if rounding == "gptq" else 1
    )
    if layer.scheme.is_static:
        largest = max(float(rotate_blocks(x, HEAD).abs().max()) for x in inputs)
        torch.testing.assert_close(float(layer.input_scale), largest / QMAX[torch.int8], rtol=1e-5, atol=0)
    x = inputs[0].reshape(-1, layer.in_features)
    expected = reference.w8a8_linear(
        x, layer.plain_weight(), layer._plain_scale(), None, layer.input_scale, rotate=HEAD
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_ranges_are_of_the_rotated_input_and_rows_and_hessian_are_not() -> None:
    linear = nn.Linear(WIDTH, 8)
    x = torch.randn(1, 40, WIDTH)
    x[0, 7, 3] = 1000.0
    calls = [BlockCall((x,), {}), BlockCall((x * 2,), {})]
    block = nn.Sequential(linear)
    source = collect_statistics(block, {"0": linear}, calls, Windows({0}, {1}), True, rotated={"0": 32}).inputs["0"]
    rotated = rotate_blocks(2 * x[0], 32)
    assert source.absmax is not None
    assert source.hessian is not None
    torch.testing.assert_close(source.absmax, rotated.abs().amax(0))
    torch.testing.assert_close(source.hessian, (2 * x[0]).T @ (2 * x[0]))
    assert torch.equal(source.rows[0], x[0])
    tokens = rotate_blocks(x[0], 32).abs().amax(1)
    assert source.massive == (pytest.approx(float(tokens.max() / tokens.median()), rel=0.2), 7)


def outliers_(model: nn.Module, factor: float = 60.0) -> None:
    """Makes two channels behind each ``up_proj`` larger, and undoes it in ``down_proj``; the function stays."""
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.up_proj.weight[:2] *= factor
            layer.mlp.down_proj.weight[:, :2] /= factor


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_outliers_behind_an_activation_cost_less(scheme: str) -> None:
    original = tiny.build("llama", intermediate_size=256)
    outliers_(original)
    expected, errors = tiny.logits(original, IDS), {}
    for rotate in ("none", "down"):
        model = quantize(copy.deepcopy(original), DATA, Recipe(scheme, smooth=False, rotate=rotate), progress=False)
        errors[rotate] = tiny.relative_error(model, expected, IDS)
    # Two of 256 channels are 60 times larger: rotated, each value has 60 * sqrt(2) / 16 = 5 times the others' size, a
    # twelfth. What other layers lose is the same for both.
    assert errors["down"] < errors["none"] / 2


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_experts_rotate_what_down_reads(architecture: str) -> None:
    original = tiny.build(architecture)
    expected = tiny.logits(original, IDS)
    model = quantize(copy.deepcopy(original), DATA, Recipe(smooth=False, rotate="down"), progress=False)
    experts = [module for module in model.modules() if isinstance(module, W8A8Experts)]
    assert experts
    for module, source in zip(experts, (m for m in original.modules() if hasattr(m, "gate_up_proj")), strict=True):
        assert module.rotate == (0, HEAD)
        layer = dict(module.layers())[f"0.{module.names['down']}"]
        weight = rotate_blocks(source.down_proj[0], HEAD)
        assert layer.rotate == HEAD
        assert ((layer.plain_weight() * layer.weight_scale - weight).abs() <= layer.weight_scale * 0.51).all()
    assert tiny.relative_error(model, expected, IDS) < 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "qwen2_moe", "bloom"])
def test_all_inputs_are_rotated_and_nothing_else_changes(architecture: str) -> None:
    original = tiny.build(architecture)
    expected = tiny.logits(original, IDS)
    model = quantize(copy.deepcopy(original), DATA, Recipe(smooth=False, rotate="inputs"), progress=False)
    plain = quantize(copy.deepcopy(original), DATA, Recipe(smooth=False), progress=False)
    for name, module in model.named_modules():
        if isinstance(module, W8A8Linear):
            source = original.get_submodule(name)
            weight = rotate_blocks(tiny.input_columns(source).T.detach(), module.rotate)
            assert module.rotate == block_size(module.in_features) > 0
            error = (module.plain_weight() * module._plain_scale() - weight).abs()
            assert (error <= module._plain_scale() * 0.51).all()
        elif isinstance(module, W8A8Experts):
            assert module.rotate == (WIDTH, HEAD)
    assert model.smoothquant_report.fused == plain.smoothquant_report.fused
    # Without outliers there is nothing to gain, and nothing is lost but by chance.
    assert tiny.relative_error(model, expected, IDS) < 1.5 * tiny.relative_error(plain, expected, IDS)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "qwen2_moe", "bloom"])
def test_what_is_rotated_is_smoothed_before(architecture: str) -> None:
    original = tiny.build(architecture)
    smoothed = quantize(copy.deepcopy(original), DATA, Recipe(), progress=False)
    model = quantize(original, DATA, Recipe(rotate="inputs"), progress=False)
    assert model.smoothquant_report.groups == smoothed.smoothquant_report.groups
    layers = layers_of(smoothed)
    for name, layer in layers_of(model).items():
        scale, before = layer._plain_scale(), layers[name]._plain_scale()
        weight = rotate_blocks(layers[name].plain_weight() * before, layer.rotate)
        error = (layer.plain_weight() * scale - weight).abs()
        # Each of a block's values is off by half a step at most, so what they are rotated to is by that times the root
        # of their number.
        assert (error <= 0.51 * (scale + before * layer.rotate**0.5)).all()
    fixed = quantize(tiny.build(architecture), DATA, Recipe("int8-static", rotate="inputs"), progress=False)
    assert not fixed.smoothquant_report.groups, "its static scales are of the rotated input"


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_outliers_of_a_norm_are_smoothed_before_they_are_rotated(rounding: Any) -> None:
    original = tiny.build("llama")
    tiny.amplify_outliers(original)
    expected, errors = tiny.logits(original, IDS), {}
    for smooth in (True, False):
        recipe = Recipe(smooth=smooth, rounding=rounding, rotate="inputs")
        model = quantize(copy.deepcopy(original), DATA, recipe, progress=False)
        errors[smooth] = tiny.relative_error(model, expected, IDS)
    assert errors[True] < errors[False] / 2


def test_experts_pass_gradients_back_through_both_rotations() -> None:
    model = quantize(tiny.build("mixtral"), DATA, Recipe(rotate="inputs"), progress=False)
    experts = next(module for module in model.modules() if isinstance(module, W8A8Experts))
    x = torch.randn(5, WIDTH, requires_grad=True)
    index, weights = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    y = experts(x, index, weights)
    wide = in_floating_point(experts, x.detach(), index, weights)
    assert float((y.detach() - wide).norm() / wide.norm()) < 0.05
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    step, at = 1e-4 * torch.randn(5, WIDTH, dtype=torch.float64), x.detach().double()
    ahead, behind = (in_floating_point(experts, at + way * step, index, weights) for way in (1, -1))
    expected = ((ahead - behind) * y.detach()).sum()  # of the sum of squares, whose gradient to y is 2 y
    torch.testing.assert_close((gradient * step).sum(), expected, rtol=1e-4, atol=0)


def test_layers_outside_of_blocks_and_in_floating_point_are_left_alone() -> None:
    original = tiny.build("llama")
    model = quantize(
        copy.deepcopy(original), DATA, Recipe(rotate="down", skip=("layers.0.mlp.down_proj",)), progress=False
    )
    kept = model.model.layers[0].mlp.down_proj
    assert torch.equal(kept.weight, original.model.layers[0].mlp.down_proj.weight)
    assert model.model.layers[1].mlp.down_proj.rotate == HEAD


@pytest.mark.parametrize("rotate", ["heads,down", "down", "inputs"])
def test_a_layer_of_the_llama_family_stays_one_op(rotate: str) -> None:
    model = tiny.build("llama")
    plain = quantize(copy.deepcopy(model), DATA, Recipe(), progress=False)
    rotated = quantize(model, DATA, Recipe(rotate=rotate), progress=False)
    assert rotated.smoothquant_report.fused == plain.smoothquant_report.fused
    assert "model.layers.1" in rotated.smoothquant_report.fused


@pytest.mark.parametrize(
    "recipe", [Recipe("int8-static", alpha="auto", rotate="down"), Recipe(auto_skip=1, rotate="down")]
)
def test_searches_and_choices_take_rotated_layers(recipe: Recipe) -> None:
    original = tiny.build("llama", intermediate_size=256)
    outliers_(original)
    expected = tiny.logits(original, IDS)
    plain = quantize(copy.deepcopy(original), DATA, Recipe("int8-static", smooth=False), progress=False)
    model = quantize(original, DATA, recipe, progress=False)
    assert tiny.relative_error(model, expected, IDS) < tiny.relative_error(plain, expected, IDS) / 2


# --- auto -----------------------------------------------------------------------------------------------------------


def test_auto_rotates_where_it_pays() -> None:
    model = tiny.build("llama", intermediate_size=256)
    outliers_(model)
    expected = tiny.logits(model, IDS)
    plain = quantize(copy.deepcopy(model), DATA, Recipe(smooth=False), progress=False)
    quantize(model, DATA, Recipe(smooth=False, rotate="auto"), progress=False)
    rotations = model.smoothquant_report.rotations
    assert rotations.errors is not None
    assert rotations.errors[1] < rotations.errors[0]
    assert rotations.residual
    assert rotations.heads
    assert set(rotations.inputs.values()) == {256}
    assert tiny.relative_error(model, expected, IDS) < tiny.relative_error(plain, expected, IDS) / 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral"])
def test_auto_leaves_the_model_alone_where_it_does_not_pay(architecture: str) -> None:
    """What is undone is undone bit for bit, tied weights included."""
    original = tiny.build(architecture)
    tied = original.config.tie_word_embeddings
    plain = quantize(copy.deepcopy(original), DATA, Recipe(), progress=False)
    with patch.object(rotation_choice, "_mean_error", side_effect=[0.01, 0.011]):
        model = quantize(original, DATA, Recipe(rotate="auto"), progress=False)
    rotations = model.smoothquant_report.rotations
    assert rotations == Rotations(refused="its blocks are no better for it", errors=(0.01, 0.011))
    assert model.config.tie_word_embeddings == tied
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(plain, IDS))
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("rotate", ["auto", "auto,residual"])
def test_auto_makes_no_model_larger(rotate: str) -> None:
    model = tiny.build("gemma")
    assert model.config.tie_word_embeddings
    with patch.object(rotation_choice, "_mean_error", side_effect=[0.02, 0.01]):
        quantize(model, DATA, Recipe(rotate=rotate), progress=False)
    rotations = model.smoothquant_report.rotations
    assert (rotations.residual, rotations.untied, model.config.tie_word_embeddings) == (False, 0, True)
    assert "would not share the token embedding's weight then, 0.0 MB more" in rotations.refused
    assert bool(rotations.heads) == bool(rotations.inputs) == (rotate == "auto")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_auto_leaves_fp8_alone_without_trying() -> None:
    model = quantize(tiny.build("llama"), DATA, Recipe("fp8", rotate="auto"), progress=False)
    rotations = model.smoothquant_report.rotations
    assert (rotations.errors, rotations.refused) == (None, "fp8 loses by a rotation")


class Router(nn.Module):
    """A causal LM whose block is called without hidden states that could be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.embedding = nn.Embedding(tiny.VOCAB, WIDTH)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)) for _ in range(2)])
        self.head = nn.Linear(WIDTH, tiny.VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        rows = self.embedding(input_ids).reshape(-1, WIDTH)
        for layer in self.layers:
            rows = rows + layer(rows)
        return CausalLMOutput(logits=self.head(rows).reshape(*input_ids.shape, -1))


def test_blocks_of_rows_are_left_alone() -> None:
    structure = find_structure(Router(), DATA[0])
    assert all(find_online(structure.blocks[name], ()) == {} for name in structure.called)


@pytest.mark.parametrize(
    ("rotate", "rotations", "lines"),
    [
        ("residual,heads,auto", Rotations(refused="fp8 loses by it"), ["Nothing is rotated, because fp8 loses by it"]),
        (
            "heads,auto",
            Rotations(heads={"o": 16}),
            ["Rotated: the values of attention in 1 blocks, heads of 16 channels"],
        ),
    ],
)
def test_the_report_gives_no_other_reason(rotate: str, rotations: Rotations, lines: list[str]) -> None:
    report = Report(Recipe(rotate=rotate), rotations=rotations)
    assert [line.plain for line in _rotation_lines(report)] == lines
