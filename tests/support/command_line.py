"""Runs commands in this process, and a directory of files for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_text import some_text, write_tiny_model
from typer.testing import CliRunner

from smoothquant_ext import cli

SMALL = ("--samples", "4", "--seqlen", "24")


def smoothquant(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def complaint(*arguments: object) -> str:
    """Runs a command that must fail with exit code 2, and returns the one sentence it said."""
    result = smoothquant(*arguments, code=2)
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert result.stderr.rstrip().endswith(said[0]), "the error must be the last thing said"
    return said[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a text and the model quantized."""
    path = tmp_path_factory.mktemp("cli")
    write_tiny_model(path / "model")
    (path / "text.txt").write_text(some_text(2_000))
    portable = ("--format", "compressed-tensors")
    smoothquant("quantize", path / "model", "-o", path / "w8a8", "--calib", path / "text.txt", *SMALL, *portable)
    return path
