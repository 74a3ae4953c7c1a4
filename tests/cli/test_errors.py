"""The command line: what bad input gets, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from tiny_text import some_text, write_tiny_model
from typer.testing import CliRunner

from smoothquant_ext import cli


@pytest.fixture
def no_loading(monkeypatch):
    """Makes loading a model fail the test: what is wrong must be said before such work begins."""

    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("smoothquant_ext.models.load_model", refuse)


def test_an_instruction_set_that_is_not_there_is_one_sentence(monkeypatch):
    def refuse() -> None:
        raise RuntimeError("SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable\nsome frames of C++")

    monkeypatch.setattr("smoothquant_ext.ops.info", refuse)
    assert complaint("info") == "SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable"


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--scheme", "int4"), "unknown scheme 'int4', expected one of int8"),
        (("--alpha", "1.5"), "alpha is 1.5, expected a number between 0 and 1"),
        (("--alpha", "much"), "--alpha is 'much', expected a number"),
        (("--auto-skip", "-1"), "auto_skip is -1.0, expected a number of layers or a share below 1"),
        (("--auto-skip", "nan"), "auto_skip is nan, expected a number of layers or a share below 1"),
        (("--auto-skip", "inf"), "auto_skip is inf, expected a number of layers or a share below 1"),
        (("--auto-skip", "100%"), "--auto-skip is '100%', expected a percentage below 100"),
        (("--max-ppl-increase", "nan"), "max_ppl_increase is nan, expected a number above 0"),
        (("--auto-skip", "2.5"), "auto_skip is 2.5, expected a number of layers or a share below 1"),
        (("--max-ppl-increase", "0%"), "max_ppl_increase is 0.0, expected a number above 0"),
        (("--rounding", "up"), "rounding is 'up', expected one of nearest, clip, gptq"),
        (("--clipping", "most"), "clipping is 'most', expected one of absmax"),
        (("--format", "gguf"), "--format is 'gguf', expected one of auto, compressed-tensors, lmdeploy"),
        (("--scheme", "fp8-e5m2", "--format", "compressed-tensors"), "cannot store scheme 'fp8-e5m2'"),
        (("--scheme", "int8-static", "--format", "lmdeploy"), "no static activation scales"),
        (("--dtype", "int8"), "--dtype is 'int8', expected one of auto, float32"),
    ],
)
def test_bad_options_are_said_before_any_work(tmp_path, options, expected):
    assert expected in complaint("quantize", "any-model", "-o", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_loading")
def test_a_directory_in_use_is_refused_before_any_work_and_left_alone(tmp_path):
    (tmp_path / "diary.docx").write_text("dear diary")
    assert "already holds diary.docx" in complaint("quantize", "any-model", "-o", tmp_path)
    assert "is a file" in complaint("quantize", "any-model", "-o", tmp_path / "diary.docx")
    assert [path.name for path in tmp_path.iterdir()] == ["diary.docx"]


@pytest.mark.usefixtures("no_loading")
def test_a_picture_without_a_folder_is_refused_before_any_work(tmp_path):
    assert "does not exist, make it first" in complaint("inspect", "any", "--plot", tmp_path / "no" / "o.png")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("too short", "has 9 tokens, fewer than one window of 24: give more text"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_bad_calibration_text_leaves_nothing_behind(work, tmp_path, content, expected):
    text = tmp_path / "bad.txt"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = complaint("quantize", work / "model", "-o", tmp_path / "out", "--calib", text, *SMALL)
    assert expected in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_little_text_is_used_with_a_warning(work, tmp_path):
    text = tmp_path / "little.txt"
    text.write_text(some_text(60))
    result = smoothquant("eval", work / "model", "--text", text, *SMALL)
    assert "warning: " in result.stderr
    assert "holds 2 windows of 24 tokens, not 4" in result.stderr


def test_bad_models_are_named(work, tmp_path):
    assert "missing.gguf does not exist" in complaint("eval", tmp_path / "missing.gguf")
    assert "is in 8 bits already" in complaint(
        "quantize", work / "w8a8", "-o", tmp_path / "o", "--calib", work / "text.txt", *SMALL
    )
    assert "matches no linear layer" in complaint(
        "quantize", work / "model", "-o", tmp_path / "o", "--calib", work / "text.txt", *SMALL, "--skip", "nothing"
    )
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_damaged_is_named_with_its_layer(work, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work / "model")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(work / "model").save_pretrained(tmp_path / "damaged")
    calib = ("--calib", work / "text.txt", *SMALL)
    said = complaint("quantize", tmp_path / "damaged", "-o", tmp_path / "out", *calib)
    assert "model.layers.1.mlp.up_proj.weight holds 1 non-finite" in said
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused(work):
    assert "the prompt is empty" in complaint("generate", work / "model", "")


def test_a_comparison_longer_than_the_model_was_made_for_is_said(work):
    rounds = ("--rounds", "1", "--decode", "2")
    result = smoothquant("compare", work / "model", work / "w8a8", "--text", work / "text.txt", *SMALL, *rounds)
    assert "warning: 512 + 2 tokens are timed, and the model was made for 128" in result.stderr


@pytest.mark.parametrize("arguments", [["quantize"], ["compare", "one"], ["nonsense"], ["eval", "m", "--samples", "0"]])
def test_wrong_usage_exits_with_2(arguments):
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("smoothquant_ext.models.load_model", break_down)
    result = CliRunner().invoke(cli.app, ["eval", "any"])
    assert isinstance(result.exception, ZeroDivisionError)


ENTRY = [sys.executable, "-c", "import sys; from smoothquant_ext.cli import main; sys.argv[0] = 'smoothquant'; main()"]


def test_as_a_program_it_fails_in_one_line(tmp_path):
    missing = tmp_path / "none.gguf"
    done = subprocess.run([*ENTRY, "eval", str(missing)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: {missing} does not exist; name an existing .gguf file"
    assert "Traceback" not in done.stderr


def test_as_a_program_it_ends_quietly_when_interrupted(tmp_path):
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=1_000_000)
    prompt = [*ENTRY, "generate", str(model), "go", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        prompt, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it has begun to talk
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
