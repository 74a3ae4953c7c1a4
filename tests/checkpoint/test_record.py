"""The record of a run: plain JSON that says what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from smoothquant_ext.checkpoint.record import RECORD, VERSION, read_record
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.numerics import outlier_ratio
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.report import MOST_BINS, Report, SmoothedGroup, to_record
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
    found = json.loads(json.dumps(to_record(report), allow_nan=False), parse_constant=reject)
    assert found["version"] == VERSION
    assert found["recipe"]["scheme"] == recipe.resolved_scheme.name
    for name in ("alpha", "smooth", "explicit", "rounding", "clipping", "auto_skip", "max_ppl_increase"):
        assert found["recipe"][name] == getattr(recipe, name)
    assert found["recipe"]["skip"] == list(recipe.skip)
    assert found["recipe"]["only"] == list(recipe.only)
    for name in ("quantized", "skipped", "failed", "unsmoothed", "errors", "damages", "limits", "seconds"):
        assert found[name] == getattr(report, name)
    groups = [SmoothedGroup(**group | {"consumers": tuple(group["consumers"])}) for group in found["groups"]]
    assert groups == report.groups
    assert {tuple(each["layers"]): each["kl"] for each in found["sensitivity"]} == report.sensitivity
    assert {name: tuple(pair) for name, pair in found["massive"].items()} == report.massive
    assert found["outliers"].keys() == report.outliers.keys()
    for name, (before, after) in report.outliers.items():
        each = found["outliers"][name]
        for values, tensor, ratio in (("before", before, "ratio_before"), ("after", after, "ratio_after")):
            assert each[values] == pytest.approx(tensor.tolist(), rel=1e-3)  # four digits
            assert each[ratio] == pytest.approx(outlier_ratio(tensor))
    if recipe.smooth:
        assert any(each["ratio_after"] < each["ratio_before"] / 2 for each in found["outliers"].values())


@pytest.mark.parametrize("channels", [1, 2, 127, 128, 129, 255, 256, 1000, 4097])
def test_many_channels_are_binned_and_none_is_lost(channels: int) -> None:
    absmax = torch.rand(channels, generator=torch.Generator().manual_seed(0)) + 0.5
    absmax[channels * 2 // 3] = 70.0
    (found,) = to_record(Report(Recipe(), outliers={"layer": (absmax, absmax / 2)}))["outliers"].values()
    size = -(-channels // MOST_BINS)
    expected = [max(absmax[start : start + size].tolist()) for start in range(0, channels, size)]
    assert len(found["before"]) <= MOST_BINS
    assert found["before"] == pytest.approx(expected, rel=1e-3)
    assert found["after"] == pytest.approx([value / 2 for value in expected], rel=1e-3)
    assert max(found["before"]) == 70.0
    assert found["before"].index(70.0) == channels * 2 // 3 // size


def test_a_dead_input_is_still_json() -> None:
    outliers = {"layer": (torch.zeros(5), torch.zeros(5)), "half": (torch.tensor([0.0, 0.0, 1.0]),) * 2}
    text = json.dumps(to_record(Report(Recipe(), outliers=outliers)), allow_nan=False)
    assert json.loads(text)["outliers"]["layer"]["ratio_before"] == 0.0


def test_every_scheme_has_its_name() -> None:
    assert [to_record(Report(Recipe(scheme)))["recipe"]["scheme"] for scheme in SCHEMES] == list(SCHEMES)


def test_reading(tmp_path: Path) -> None:
    made = to_record(Report(Recipe(), quantized=["ä"]))
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
    (b'{"version": 2}', "not a record of version"),
])  # fmt: skip
def test_reading_what_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(SmoothQuantError, match=message):
        read_record(tmp_path)
