"""The commands that write into checkpoints besides quantize's own: convert, and what is measured for the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny_mixtures
import torch
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from safetensors.torch import load_file
from stored_files import change_tensors
from transformers import AutoConfig

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


def test_convert_says_what_it_does_with_what_the_model_does_not_know(work: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(work / "w8a8", source)
    added = {f"mtp.layers.{i}.norm.weight": torch.rand(64).double() for i in range(3)} | {
        "mtp.fc.weight": torch.rand(4, 4)
    }
    change_tensors(source, lambda tensors: tensors.update(added))
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    (source / "NOTICE").write_bytes(b"of somebody")
    result = smoothquant("convert", source, "-o", tmp_path / "all", "--format", "lmdeploy", "--drop", "mtp.fc.*")
    said = " ".join(result.stdout.split())
    assert "3 tensors that the model's class does not know: copied as they are: mtp.layers.0-2.norm.weight (3)." in said
    assert "1 tensor that the model's class does not know: dropped: mtp.fc.weight." in said
    assert "Not copied, because they are other weights or tools' own: pytorch_model.bin." in said
    stored = load_file(tmp_path / "all" / "model.safetensors")
    assert all(torch.equal(stored[name], added[name]) for name in added if "layers" in name)
    assert "mtp.fc.weight" not in stored
    assert (tmp_path / "all" / "NOTICE").read_bytes() == b"of somebody"
    assert "3 tensors that" in complaint("generate", tmp_path / "all", "Hello")
    smoothquant("generate", tmp_path / "all", "Hello", "--max-new-tokens", 2, "--drop", "mtp.*")


def test_quantize_takes_the_other_files_of_a_directory_along(work: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(work / "model", source)
    (source / "LICENSE").write_bytes(b"all yours")
    (source / "README.md").write_bytes(b"# Theirs")
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    arguments = ("quantize", source, "-o", tmp_path / "w8a8", "--calib", work / "text.txt", *SMALL, "--no-smooth")
    for _ in range(2):  # over its own result
        smoothquant(*arguments)
        assert (tmp_path / "w8a8" / "LICENSE").read_bytes() == b"all yours"
        assert "smoothquant" in (tmp_path / "w8a8" / CARD).read_text()
        assert not (tmp_path / "w8a8" / "pytorch_model.bin").exists()


def test_quantize_leaves_in_fp32_what_transformers_keeps_there(work: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(work / "model", source)
    (source / "model.safetensors").unlink()
    model = tiny_mixtures.build("deepseek_v3", torch.bfloat16, vocab_size=AutoConfig.from_pretrained(source).vocab_size)
    model.save_pretrained(source)
    smoothquant("quantize", source, "-o", tmp_path / "w8a8", "--calib", work / "text.txt", *SMALL, "--no-smooth")
    stored, original = (load_file(path / "model.safetensors") for path in (tmp_path / "w8a8", source))
    kept = [name for name in stored if name in original and stored[name].dtype == original[name].dtype]
    assert {stored[name].dtype for name in kept} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(stored[name], original[name]) for name in kept)
    assert {name for name in original if original[name].dtype == torch.float32} <= set(kept)


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
