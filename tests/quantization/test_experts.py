"""Mixtures of experts through quantize: selection, smoothing, report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from smoothquant_ext import Recipe, SmoothQuantError, quantize, save
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.reporting.profiler import profile_products
from smoothquant_ext.reporting.tables import render_report

CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]


@pytest.mark.parametrize("recipe", [Recipe("int8-static"), Recipe("fp8-static"), Recipe("int8", alpha="auto")])
def test_recipes_on_a_model_with_experts(recipe: Recipe) -> None:
    model, ids = tiny.build("qwen2_moe"), tiny.token_ids(seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        quantize(model, CALIBRATION, recipe, progress=False)
        error = float((model(ids).logits - expected).norm() / expected.norm())
    report = model.smoothquant_report
    names = {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
    assert names <= set(report.quantized)
    assert not names & set(report.unsmoothed)
    assert (names <= set(report.per_token)) == recipe.resolved_scheme.is_static
    assert error < 0.15  # as every architecture in test_quantize, and a half for e4m3, one bit less per step


def test_patterns_reach_experts() -> None:
    model = tiny.build("mixtral")
    first, second = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    structure = find_structure(model, tiny.token_ids())
    selection = select_linears(structure, Recipe(skip=("layers.0.mlp.experts",)))
    assert selection.skipped[first] == "skipped by pattern"
    assert set(selection.experts) == {second}
    assert set(select_linears(structure, Recipe(only=("experts",))).experts) == {first, second}
    with pytest.raises(SmoothQuantError, match="matches no linear layer"):
        select_linears(structure, Recipe(skip=("layers.2.mlp.experts",)))


def test_experts_alone() -> None:
    model, ids = tiny.build("mixtral"), tiny.token_ids(seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        quantize(model, CALIBRATION, Recipe(only=("experts",)), progress=False)
        error = float((model(ids).logits - expected).norm() / expected.norm())
    assert {name.rpartition(".")[2] for name in model.smoothquant_report.quantized} == {"experts"}
    assert 0 < error < 0.1


def test_damaged_experts_are_named() -> None:
    model = tiny.build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(SmoothQuantError, match=r"layers.1.mlp.experts.down_proj holds 1 non-finite"):
        quantize(model, CALIBRATION, progress=False)


def test_experts_that_cannot_be_read_stay_in_floating_point() -> None:
    sizes = tiny.LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "gpt_oss"}
    tiny_gpt_oss = {**tiny.CONFIGS, "gpt_oss": sizes}
    before = tiny.CONFIGS
    tiny.CONFIGS = tiny_gpt_oss
    try:
        model = tiny.build("gpt_oss")
    finally:
        tiny.CONFIGS = before
    quantize(model, CALIBRATION, progress=False)
    reason = "experts that compute something other than down(act(gate(x)) * up(x))"
    assert model.smoothquant_report.skipped["model.layers.0.mlp.experts"] == reason


def test_a_model_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    model = quantize(tiny.build("qwen2_moe"), CALIBRATION, Recipe("int8-static"), progress=False)
    save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert model_bytes(model).total == sum(tensor.nbytes for tensor in stored.values())
    assert "14 linear layers and the experts of 2 mixtures run in int8-static" in rendered(model)
    assert "With a scale per token, as experts always have: model.layers.*.mlp.experts (2)" in rendered(model)
    # The experts of a mixture are one entry of the configuration, however many there are.
    groups = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = [
        target for group in groups.values() for target in group["targets"] if ".experts" in target.replace("\\", "")
    ]
    assert targets == [rf"re:model\.layers\.{layer}\.mlp\.experts\.\d+\.\w+$" for layer in (0, 1)]
    products = profile_products(model, tiny.token_ids(rows=1))
    assert products.eight_bit["sq::w8a8_experts"] == 2
    assert not products.float_inside


def rendered(model: nn.Module) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_report(model.smoothquant_report))
    return console.export_text()


def test_outliers_within_experts_are_smoothed_away() -> None:
    ids = tiny.token_ids(seed=9)

    def error(smooth: bool, factor: float) -> float:
        model = tiny.build("qwen3_moe")
        for layer in model.model.layers:
            experts = layer.mlp.experts
            inner = experts.down_proj.shape[2]
            experts.gate_up_proj.data[:, inner + 3] *= factor  # up's
            experts.down_proj.data[:, :, 3] /= factor
        with torch.no_grad():
            expected = model(ids).logits
            quantize(model, CALIBRATION, Recipe(smooth=smooth, only=("experts",)), progress=False)
            groups = {group.producer for group in model.smoothquant_report.groups}
            names = {f"model.layers.{number}.mlp.experts.up" for number in (0, 1)}
            assert (names <= groups) == smooth
            assert not model.smoothquant_report.failed
            return float((model(ids).logits - expected).norm() / expected.norm())

    # As in test_architectures: a channel 300 times the others costs them all their bits.
    assert error(True, 300.0) < error(False, 300.0) / 3
    assert error(True, 300.0) < 1.5 * error(True, 1.0)


def test_experts_with_few_tokens_are_left_alone() -> None:
    model = tiny.build("qwen3_moe")
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    short = [tiny.token_ids(rows=1, tokens=8)]
    quantize(model, short, progress=False)
    failed = model.smoothquant_report.failed
    assert failed["model.layers.0.mlp.experts.up"] == "no expert was given 32 calibration tokens"
    experts = model.model.layers[0].mlp.experts
    for expert in range(4):
        dequantized = experts.dequantized("down", expert, torch.float32)
        assert bool(((dequantized - before[expert]).abs() <= 0.5001 * experts.down_scale[expert]).all())
