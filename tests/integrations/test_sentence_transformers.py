"""A real embedding model in 8 bits, as sentence-transformers loads and runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import smoothquant
from tiny_media import minilm_directory
from tiny_text import some_text

import smoothquant_ext
from smoothquant_ext.nn.linear import W8A8Linear

SENTENCES = [
    "The state of our union is strong.",
    "Taxes must be cut.",
    "We are at war with an enemy that hides in shadows, and we shall not rest until it is defeated, here or elsewhere.",
    "Peace",
    " ".join(["Tonight, I ask the Congress to join me in a great new effort to educate our children."] * 4),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minilm")
    (folder / "book.txt").write_text(" ".join(SENTENCES) + some_text(2_000))
    calib = ("--calib", folder / "book.txt", "--samples", "8", "--seqlen", "64")
    smoothquant("quantize", minilm_directory(), "-o", folder / "w8a8", *calib)
    return folder / "w8a8"


@pytest.fixture
def enabled() -> Iterator[Any]:
    module = pytest.importorskip("sentence_transformers")
    smoothquant_ext.enable()
    yield module.SentenceTransformer
    smoothquant_ext.disable()


def test_embeddings(directory: Path, enabled: Any) -> None:
    """Close to the original's, normalized, and the same bit for bit alone, in any company, in any order."""
    model, original = enabled(str(directory), device="cpu"), enabled(str(minilm_directory()), device="cpu")
    assert sum(isinstance(module, W8A8Linear) for module in model.modules()) == 37
    together, expected = model.encode(SENTENCES), original.encode(SENTENCES)
    assert together.dtype == np.float32
    assert np.abs(np.linalg.norm(together, axis=1) - 1).max() < 1e-5
    assert (together * expected).sum(1).min() > 0.995
    alone = np.stack([model.encode([sentence])[0] for sentence in SENTENCES])
    assert np.array_equal(alone, together)
    assert np.array_equal(model.encode(SENTENCES[::-1])[::-1], together)


def test_the_whole_directory_is_kept(directory: Path, tmp_path: Path) -> None:
    original = minilm_directory()
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "vocab.txt"):
        assert (directory / name).read_bytes() == (original / name).read_bytes()
    card = (directory / "README.md").read_text()
    assert "library_name: sentence-transformers\npipeline_tag: sentence-similarity\n" in card
    assert 'model = SentenceTransformer("w8a8")' in card
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    smoothquant("convert", directory, "-o", tmp_path / "again", "--format", "smoothquant-ext")
    assert (tmp_path / "again" / "modules.json").is_file()


def test_weights_of_further_modules_go_along(tmp_path: Path) -> None:
    """Also pickled ones, which only sentence-transformers reads."""
    from smoothquant_ext.checkpoint.other_files import other_files

    (tmp_path / "2_Dense").mkdir()
    for name in ("pytorch_model.bin", "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors", "2_Dense/config.json"):
        (tmp_path / name).write_bytes(b"x")
    assert not dict(other_files(tmp_path))[Path("2_Dense/pytorch_model.bin")]
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    parts = {str(file): is_part for file, is_part in other_files(tmp_path)}
    assert parts == {
        "modules.json": True,
        "pytorch_model.bin": False,
        "2_Dense/config.json": True,
        "2_Dense/model.safetensors": True,
        "2_Dense/pytorch_model.bin": True,
    }
