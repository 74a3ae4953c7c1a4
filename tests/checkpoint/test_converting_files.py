"""The other files of a checkpoint that is converted or saved: they go along, or are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from stored_files import names_in, tensors_of
from tiny_w8a8 import quantized, same_bits

from smoothquant_ext import Recipe, SmoothQuantError, load, quantize, save
from smoothquant_ext.checkpoint.converting import convert
from smoothquant_ext.checkpoint.reading import CONFIG
from smoothquant_ext.checkpoint.record import RECORD
from smoothquant_ext.checkpoint.saving import FORMER_CARD

FILES = {
    "LICENSE": b"all yours",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_own.py": b"raise SystemExit",
    "preprocessor_config.json": b'{"size": 3}',
    "tokenizer.model": bytes(range(256)),
    "merges.txt": b"a b\n",
    "generation_config.json": b'{"temperature": 0.7, "do_sample": false, "of_ours": "no"}',
    ".gitattributes": b"*.safetensors filter=lfs",
    "assets/picture.png": b"\x89PNG",
    "1_Dense/model.safetensors": b"a part of a pipeline",
}
LEFT_OUT = {
    "pytorch_model.bin": b"other weights",
    "consolidated.00.safetensors": b"other weights",
    "onnx/model.onnx": b"other weights",
    "pytorch_model.bin.index.json": b"{}",
}


def add_files_(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def test_other_files_go_along_or_are_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(quantized("llama"), source)
    add_files_(source, FILES | LEFT_OUT | {"README.md": b"# Theirs"})
    (source / "__pycache__").mkdir()
    done = convert(source, tmp_path / "again", "lmdeploy")
    for name, content in FILES.items():
        assert (tmp_path / "again" / name).read_bytes() == content, name
    assert set(done.left_out) == {*LEFT_OUT, "__pycache__"}
    assert (tmp_path / "again" / FORMER_CARD).read_bytes() == b"# Theirs"
    assert "lmdeploy serve" in (tmp_path / "again" / "README.md").read_text()
    expected = {*(name.partition("/")[0] for name in FILES), CONFIG, "model.safetensors", "README.md", FORMER_CARD}
    assert set(names_in(tmp_path / "again")) == expected


def test_links_are_followed(tmp_path: Path) -> None:
    """As in the cache of the hub, where every file is a link to a blob."""
    save(quantized("llama"), tmp_path / "blobs")
    (tmp_path / "blobs" / "LICENSE").write_text("all yours")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    (tmp_path / "snapshot" / "above").symlink_to(tmp_path)
    done = convert(tmp_path / "snapshot", tmp_path / "again", "compressed-tensors")
    assert done.left_out == ("above",)
    assert not any(file.is_symlink() for file in (tmp_path / "again").iterdir())
    before, after = tensors_of(tmp_path / "blobs"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)
    (tmp_path / "snapshot" / "NOTICE").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SmoothQuantError, match="NOTICE is a link that leads nowhere"):
        convert(tmp_path / "snapshot", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_targets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(quantized("llama"), source)
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "below", tmp_path / "link", tmp_path / "link" / "below", source / "a" / "b"):
        with pytest.raises(SmoothQuantError, match="is the checkpoint to convert, or lies in it"):
            convert(source, target)
        with pytest.raises(SmoothQuantError, match="is the checkpoint to convert, or lies in it"):
            convert(tmp_path / "link", target)
    save(quantized("llama", "int8-static"), tmp_path / "static")
    with pytest.raises(SmoothQuantError, match="format 'lmdeploy' has no static activation scales"):
        convert(tmp_path / "static", tmp_path / "target", "lmdeploy")
    assert names_in(tmp_path) == ["link", "source", "static"]


def test_copied_files_do_not_keep_a_checkpoint_from_being_replaced(tmp_path: Path) -> None:
    model = quantize(tiny.build("llama"), [tiny.token_ids()], Recipe(smooth=False), progress=False)
    origin = tmp_path / "origin"
    origin.mkdir()
    add_files_(origin, FILES)
    save(model, tmp_path / "source", files_from=origin)
    assert (tmp_path / "source" / "LICENSE").read_bytes() == FILES["LICENSE"]
    assert (tmp_path / "source" / "assets" / "picture.png").is_file()
    save(model, tmp_path / "source", files_from=origin)
    for _ in range(2):
        convert(tmp_path / "source", tmp_path / "again", "lmdeploy")
        assert (tmp_path / "again" / "modeling_own.py").is_file()
    (tmp_path / "again" / "notes.txt").write_text("mine")
    with pytest.raises(SmoothQuantError, match=r"already holds notes\.txt"):
        convert(tmp_path / "source", tmp_path / "again", "lmdeploy")
    save(load(tmp_path / "source"), tmp_path / "alone")
    assert "files" not in json.loads((tmp_path / "alone" / "smoothquant.json").read_text())


def test_a_record_that_cannot_be_read_is_copied(tmp_path: Path) -> None:
    save(quantized("llama"), tmp_path / "source")
    (tmp_path / "source" / RECORD).write_text('{"version": 1}')
    with pytest.warns(UserWarning, match="is not a record of version 2.*; it is copied as it is"):
        convert(tmp_path / "source", tmp_path / "again")
    assert (tmp_path / "again" / RECORD).read_text() == '{"version": 1}'
