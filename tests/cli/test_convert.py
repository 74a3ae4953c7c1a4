"""The commands that write into checkpoints besides quantize's own: convert, and what is measured for the model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from safetensors.torch import load_file

from smoothquant_ext.checkpoint.model_card import CARD
from smoothquant_ext.checkpoint.record import RECORD, read_record


def test_convert_keeps_every_number(work: Path, tmp_path: Path) -> None:
    result = smoothquant("convert", work / "w8a8", "-o", tmp_path / "lmdeploy", "--format", "lmdeploy")
    assert "14 layers in 8 bits, unchanged" in result.stdout
    back = smoothquant("convert", tmp_path / "lmdeploy", "-o", tmp_path / "back")
    assert "14 layers" in back.stdout
    mine, theirs, again = (
        load_file(path / "model.safetensors") for path in (work / "w8a8", tmp_path / "lmdeploy", tmp_path / "back")
    )
    assert mine.keys() == again.keys()
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(theirs[f"{name}.weight"], mine[f"{name}.weight"])
    assert torch.equal(theirs[f"{name}.scale"], mine[f"{name}.weight_scale"])
    config = json.loads((tmp_path / "lmdeploy" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "smooth_quant"
    # What belongs to the model goes along.
    assert (tmp_path / "back" / RECORD).read_text() == (work / "w8a8" / RECORD).read_text()
    assert (tmp_path / "back" / "tokenizer.json").exists()
    assert "lmdeploy serve" in (tmp_path / "lmdeploy" / CARD).read_text()


def test_convert_says_what_it_cannot_do(work: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert "is not quantized; run it through 'smoothquant quantize'" in complaint(
        "convert", work / "model", "-o", target
    )
    same = complaint("convert", work / "w8a8", "-o", work / "w8a8")
    assert "is the checkpoint to convert, or lies in it; name another directory" in same
    assert "--format is 'gguf'" in complaint("convert", work / "w8a8", "-o", target, "--format", "gguf")
    smoothquant(
        *("quantize", work / "model", "-o", tmp_path / "static", "--calib", work / "text.txt", *SMALL),
        *("--scheme", "int8-static"),
    )
    static = complaint("convert", tmp_path / "static", "-o", target, "--format", "lmdeploy")
    assert "has no static activation scales" in static
    assert not target.exists()


def test_what_is_measured_is_written_into_the_card(work: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text((work / "text.txt").read_text()[::-1])
    target = tmp_path / "w8a8"
    result = smoothquant(
        *("quantize", work / "model", "-o", target, "--calib", work / "text.txt", *SMALL),
        *("--test", tmp_path / "other.txt"),
    )
    assert "perplexity" in result.stdout
    (row,) = read_record(target)["measured"]
    assert (row["text"], row["reference"]) == ("other.txt", "model")
    assert "| other.txt | model |" in (target / CARD).read_text()
    assert read_record(target)["calibration"]["text"] == "text.txt"

    compare = ("compare", work / "model", target, "--text", work / "text.txt", *SMALL, "--rounds", 0)
    before = (target / CARD).read_text()
    smoothquant(*compare)
    assert (target / CARD).read_text() == before
    smoothquant(*compare, "--card")
    assert [row["text"] for row in read_record(target)["measured"]] == ["other.txt", "text.txt"]


def test_a_test_text_that_is_none_is_said_before_any_work(work: Path, tmp_path: Path) -> None:
    missing = complaint(
        *("quantize", work / "model", "-o", tmp_path / "w8a8", "--calib", work / "text.txt", *SMALL),
        *("--test", tmp_path / "nothing.txt"),
    )
    assert "nothing.txt" in missing
    assert not (tmp_path / "w8a8").exists()
