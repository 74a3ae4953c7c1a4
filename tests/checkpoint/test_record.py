"""The record of a run: plain JSON that says what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny_w8a8 import assert_same_model, quantized

from smoothquant_ext.checkpoint.loading import load
from smoothquant_ext.checkpoint.record import RECORD, VERSION, read_record
from smoothquant_ext.checkpoint.saving import save
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.numerics import outlier_ratio
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.report import MOST_BINS, BlockReport, LayerReport, Report, SmoothedGroup
from smoothquant_ext.scheme import SCHEMES, Scheme

DATA = [tiny.token_ids(1, 12, seed) for seed in range(5)]


def reject(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize("recipe", [
    Recipe(),
    Recipe("int8-static", alpha="auto", auto_skip=2, skip=("*.o_proj",)),
    Recipe("fp8-static", clipping="mse", max_ppl_increase=0.1, only=("mlp",)),
    Recipe(Scheme("mine", torch.int8, "tensor", "token", 0.3), smooth=False, explicit=True),
], ids=["default", "auto", "fp8", "own scheme"])  # fmt: skip
def test_it_survives_json_and_says_what_the_report_says(recipe: Recipe) -> None:
    model = tiny.build("llama")
    tiny.amplify_outliers(model)
    report: Report = quantize(model, DATA, recipe, progress=False).smoothquant_report
    found = json.loads(json.dumps(report.to_record(), allow_nan=False), parse_constant=reject)
    assert found["version"] == VERSION
    assert found["recipe"]["scheme"] == recipe.resolved_scheme.name
    for name in ("alpha", "smooth", "explicit", "rounding", "clipping", "auto_skip", "max_ppl_increase"):
        assert found["recipe"][name] == getattr(recipe, name)
    assert found["recipe"]["skip"] == list(recipe.skip)
    assert found["recipe"]["only"] == list(recipe.only)
    for name in ("quantized", "experts", "skipped", "failed", "fused", "seconds", "base", "calibration"):
        assert found[name] == getattr(report, name)
    groups = [SmoothedGroup(**group | {"consumers": tuple(group["consumers"])}) for group in found["groups"]]
    assert groups == report.groups
    assert [(tuple(unit["layers"]), unit["kl"]) for unit in found["sensitivity"]] == [
        (unit.layers, unit.kl) for unit in report.sensitivity
    ]
    blocks = {
        name: BlockReport(each["error"], list(map(tuple, each["inputs"]))) for name, each in found["blocks"].items()
    }
    assert blocks == report.blocks
    assert found["layers"].keys() == report.layers.keys()
    for name, layer in report.layers.items():
        facts = found["layers"][name]
        for fact in ("alpha", "error", "limit", "per_token"):
            assert facts[fact] == getattr(layer, fact)
        assert facts["massive"] == (None if layer.massive is None else list(layer.massive))
        for side, tensor in (("before", layer.before), ("after", layer.after)):
            assert facts[side] == pytest.approx(tensor.tolist(), rel=1e-3)  # four digits
            assert facts[f"ratio_{side}"] == pytest.approx(outlier_ratio(tensor))
    smoothed = {name for name, layer in report.layers.items() if layer.alpha is not None}
    assert smoothed == {name for group in report.groups for name in group.consumers} & report.layers.keys()
    assert bool(smoothed) == (recipe.smooth or recipe.explicit)
    if recipe.smooth:
        assert any(each["ratio_after"] < each["ratio_before"] / 2 for each in found["layers"].values())


@pytest.mark.parametrize("channels", [1, 2, 127, 128, 129, 255, 256, 1000, 4097])
def test_many_channels_are_binned_and_none_is_lost(channels: int) -> None:
    absmax = torch.rand(channels, generator=torch.Generator().manual_seed(0)) + 0.5
    absmax[channels * 2 // 3] = 70.0
    (found,) = Report(Recipe(), layers={"layer": LayerReport(absmax, absmax / 2)}).to_record()["layers"].values()
    size = -(-channels // MOST_BINS)
    expected = [max(absmax[start : start + size].tolist()) for start in range(0, channels, size)]
    assert len(found["before"]) <= MOST_BINS
    assert found["before"] == pytest.approx(expected, rel=1e-3)
    assert found["after"] == pytest.approx([value / 2 for value in expected], rel=1e-3)
    assert max(found["before"]) == 70.0
    assert found["before"].index(70.0) == channels * 2 // 3 // size


def test_a_dead_input_is_still_json() -> None:
    dead, half = torch.zeros(5), torch.tensor([0.0, 0.0, 1.0])
    layers = {"layer": LayerReport(dead, dead), "half": LayerReport(half, half)}
    text = json.dumps(Report(Recipe(), layers=layers).to_record(), allow_nan=False)
    assert json.loads(text)["layers"]["layer"]["ratio_before"] == 0.0


def test_every_scheme_has_its_name() -> None:
    assert [Report(Recipe(scheme)).to_record()["recipe"]["scheme"] for scheme in SCHEMES] == list(SCHEMES)


def test_reading(tmp_path: Path) -> None:
    made = Report(Recipe(), quantized=["ä"]).to_record()
    (tmp_path / RECORD).write_text(json.dumps(made), encoding="utf-8")
    assert read_record(tmp_path)["quantized"] == ["ä"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "only checkpoints that smoothquant quantize wrote"),
    (b"", "cannot be read as JSON"),
    (b"{", "cannot be read as JSON"),
    (b"\xff\xfe", "cannot be read as JSON"),
    (b"[]", "not a record of version"),
    (b"null", "not a record of version"),
    (b"{}", "not a record of version"),
    (b'{"version": 1}', "not a record of version"),
])  # fmt: skip
def test_reading_what_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(SmoothQuantError, match=message):
        read_record(tmp_path)


def test_a_record_that_cannot_be_read_costs_the_record_only(tmp_path: Path) -> None:
    model = quantized("llama")
    save(model, tmp_path / "model")
    (tmp_path / "model" / RECORD).write_text('{"version": 1}', encoding="utf-8")
    with pytest.warns(UserWarning, match="not a record of version .* the model runs without its record"):
        loaded = load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert not hasattr(loaded, "smoothquant_record")
