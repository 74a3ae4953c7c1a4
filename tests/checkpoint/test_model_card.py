"""Model cards: true to the checkpoint, readable by the hub, free of paths of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import ModelCard

from smoothquant_ext import Recipe, load, quantize, save
from smoothquant_ext.checkpoint.model_card import CARD, add_measured, measured_facts
from smoothquant_ext.checkpoint.record import RECORD, read_record
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluation.accuracy import Evaluation, evaluate

DATA = [tiny.token_ids(1, 12, seed) for seed in range(5)]


def quantized(recipe: Recipe, name: str = "") -> Any:
    model = tiny.build("gpt2" if recipe.explicit else "llama")
    model.config.name_or_path = name
    return quantize(model, DATA, recipe, progress=False)


def table_row(card: ModelCard, heading: str) -> str:
    """What stands beside a heading in a table of two columns."""
    (row,) = [line for line in card.text.splitlines() if line.startswith(f"| {heading} |") and line.count("|") == 3]
    return row.split("|")[2].strip()


def test_it_says_what_was_done(tmp_path: Path) -> None:
    model = quantized(Recipe("int8-static", alpha=0.7, skip=("o_proj",)), "some-org/some-model")
    save(model, tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / CARD)
    assert card.data.base_model == "some-org/some-model"
    assert card.data.base_model_relation == "quantized"
    assert {"smoothquant", "w8a8", "int8", "compressed-tensors"} <= set(card.data.tags)
    assert "12 linear layers" in card.text
    assert table_row(card, "scheme") == "`int8-static`"
    assert table_row(card, "smoothing").startswith("alpha 0.7, ")
    assert table_row(card, "calibration") == "5 windows, 60 tokens"
    assert "| left in floating point | 2 layers: skipped by pattern |" in card.text
    assert "vllm serve mine" in card.text
    assert "use_optimized_inference=True" in card.text
    assert "## Measured" not in card.text


@pytest.mark.parametrize(
    ("recipe", "fmt", "expected"),
    [
        (Recipe("int8"), "lmdeploy", "lmdeploy serve api_server mine"),
        (Recipe("int8"), "lmdeploy", "without its scales"),
        (Recipe("fp8-e5m2"), None, "lmdeploy serve api_server mine"),
        (Recipe("int8", explicit=True), None, "only smoothquant-ext reads"),
    ],
)
def test_it_says_who_can_run_it(recipe: Recipe, fmt: str | None, expected: str, tmp_path: Path) -> None:
    save(quantized(recipe), tmp_path / "mine", format=fmt)
    text = (tmp_path / "mine" / CARD).read_text()
    assert expected in text
    assert "vllm serve" not in text


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "private" / "model").mkdir(parents=True)
    save(quantized(Recipe(), str(tmp_path / "private" / "model")), tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / CARD)
    assert card.data.base_model is None
    for file in (CARD, RECORD):
        text = (tmp_path / "mine" / file).read_text()
        assert str(tmp_path) not in text
        assert "private" not in text
    assert card.text.splitlines()[3].startswith("model in 8 bits")


def test_what_is_measured_is_added_and_replaced(tmp_path: Path) -> None:
    model = quantized(Recipe())
    directory = tmp_path / "mine"
    save(model, directory)
    result = evaluate(model, tiny.token_ids(4, 20), tiny.build("llama"))
    add_measured(directory, [measured_facts("one.txt", "base", result)])
    add_measured(directory, [measured_facts("two.txt", "base", result)])
    add_measured(directory, [measured_facts("one.txt", "base", Evaluation(tokens=7, perplexity=2.0))])
    text = (directory / CARD).read_text()
    assert f"| two.txt | base | 76 | {result.perplexity:.3f} | {100 * result.change:+.2f} % |" in text
    assert "| one.txt | base | 7 | 2.000 | | | |" in text
    assert text.count("one.txt") == 1
    assert [row["text"] for row in read_record(directory)["measured"]] == ["two.txt", "one.txt"]

    # It goes along when the model is loaded and saved again, in another format too.
    save(load(directory), tmp_path / "again", format="lmdeploy")
    again = (tmp_path / "again" / CARD).read_text()
    assert "| two.txt | base | 76 |" in again
    assert "lmdeploy serve" in again
    with torch.no_grad():
        ids = tiny.token_ids()
        assert torch.equal(load(tmp_path / "again")(ids).logits, load(directory)(ids).logits)


def test_measuring_somebody_elses_checkpoint_has_nowhere_to_go(tmp_path: Path) -> None:
    model = quantized(Recipe())
    del model.smoothquant_record
    save(model, tmp_path / "theirs")
    assert "## How it was made" not in (tmp_path / "theirs" / CARD).read_text()
    with pytest.raises(SmoothQuantError, match=f"has no {RECORD}"):
        add_measured(tmp_path / "theirs", [])
