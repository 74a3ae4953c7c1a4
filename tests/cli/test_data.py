"""The data options of the commands: windows as long as the model allows, conversations, rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, complaint, smoothquant
from tiny import build
from tiny_text import CHATML, some_text, tiny_tokenizer
from transformers import AutoTokenizer

from smoothquant_ext.text import token_windows

POSITIONS = 64


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of few learned positions, which has a chat template, and texts."""
    path = tmp_path_factory.mktemp("learned")
    build("gpt2", max_position_embeddings=POSITIONS).save_pretrained(path / "model")
    tiny_tokenizer(chat_template=CHATML).save_pretrained(path / "model")
    (path / "text.txt").write_text(some_text(4_000))
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": some_text(40, n)}, {"from": "gpt", "value": "yes"}]}
        for n in range(40)
    ]
    (path / "sharegpt.json").write_text(json.dumps(rows))
    (path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"left": "no " * 99, "right": some_text(99, n)}) for n in range(9))
    )
    smoothquant("quantize", path / "model", "-o", path / "w8a8", "--calib", path / "text.txt", "--samples", "2")
    return path


def test_every_command_that_draws_windows_follows_the_positions_of_the_model(learned: Path, tmp_path: Path) -> None:
    model, text, few = learned / "model", learned / "text.txt", ("--samples", "2")
    for arguments in (
        ("quantize", model, "-o", tmp_path / "out", "--calib", text, "--test", text),
        ("eval", model, "--text", text, "--reference", model),
        ("inspect", model, "--calib", text),
        ("compare", model, learned / "w8a8", "--text", text, "--rounds", "1", "--decode", "4"),
        ("report", learned / "w8a8", "-o", tmp_path / "r.html", "--base", model, "--text", text, "--rounds", "1"),
    ):
        result = smoothquant(*arguments, *few)
        assert "the model has 64 positions: windows have 64 tokens, not 512" in result.stderr
        speeds = arguments[0] in ("compare", "report")
        assert ("fewer than 512 + " in result.stderr) == speeds
    record = json.loads((tmp_path / "out" / "smoothquant.json").read_text())
    assert record["calibration"] == {"windows": 2, "tokens": 2 * POSITIONS, "text": "text.txt"}


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(learned: Path) -> None:
    said = complaint(
        "compare", learned / "model", learned / "w8a8", "--text", learned / "text.txt", "--decode", "64", *SMALL
    )
    assert said == "decode is 64 and the model has 64 positions: ask for a shorter answer"


def test_conversations_are_read_by_the_chat_template_and_it_is_said(learned: Path, tmp_path: Path) -> None:
    path = learned / "sharegpt.json"
    result = smoothquant("quantize", learned / "model", "-o", tmp_path / "out", "--calib", path, *SMALL)
    assert f"{path}: read 'conversations' of 40 rows by the chat template" in result.stderr
    windows = token_windows(AutoTokenizer.from_pretrained(learned / "model"), path, samples=4, seqlen=24)
    expected = smoothquant("eval", learned / "model", "--text", path, "--json", *SMALL).stdout
    assert json.loads(expected)[0]["tokens"] == windows.numel() - len(windows)
    text = "".join(f"[user]{some_text(40, n)}[assistant]yes" for n in range(40))
    assert all(tiny_tokenizer().decode(window) in text for window in windows)


@pytest.mark.parametrize("command", ["quantize", "eval", "compare", "inspect"])
def test_a_field_is_named_where_it_cannot_be_told(learned: Path, tmp_path: Path, command: str) -> None:
    option = "--text" if command in ("eval", "compare") else "--calib"
    more = {"quantize": ("-o", tmp_path / "o"), "compare": (learned / "model", "--rounds", "0")}.get(command, ())
    base = (command, learned / "model", *more, option, learned / "rows.jsonl", *SMALL)
    said = complaint(*base)
    assert "rows.jsonl, line 1, has no string field 'text' (its fields: 'left', 'right')" in said
    assert "name it with --text-field" in said
    assert not (tmp_path / "o").exists()
    assert "read 'right' of 9 rows" in smoothquant(*base, "--text-field", "right").stderr


def test_rotary_models_read_windows_longer_than_they_were_made_for_with_a_sentence(tmp_path: Path) -> None:
    build("llama", max_position_embeddings=16).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(some_text(400))
    result = smoothquant("eval", tmp_path / "model", "--text", tmp_path / "text.txt", "--json", *SMALL)
    assert "has 24 tokens a row, and the model was made for 16" in result.stderr
    assert json.loads(result.stdout)[0]["tokens"] == 4 * 23


def test_windows_are_as_short_as_the_least_of_several_models_asks(learned: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    build("gpt2", max_position_embeddings=32).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    arguments = ("eval", learned / "model", "--reference", tmp_path / "small", "--text", learned / "text.txt", "--json")
    result = smoothquant(*arguments, "--samples", "2")
    assert "windows have 64 tokens, not 512" in result.stderr
    assert "has 64 tokens a row and the model 32 positions: rows are cut to 32" in result.stderr
    assert json.loads(result.stdout)[0]["tokens"] == 2 * 31
