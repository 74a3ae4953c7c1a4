"""Commands in surroundings as they are in the wild: names, locales, terminals, full disks, environment variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TextIO

import pytest
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from pages import ROOT
from rich.console import Console

from smoothquant_ext import Recipe, cli, enable, load, quantize
from smoothquant_ext.cli.console import readable
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.models import load_model


def main(monkeypatch: pytest.MonkeyPatch, out: TextIO, *arguments: object) -> tuple[int, str]:
    """The console entry point with another stdout: its exit code, and what it said on a stderr of that encoding."""
    err = TextIOWrapper(BytesIO(), encoding=out.encoding)
    monkeypatch.setattr("sys.argv", ["smoothquant", *map(str, arguments)])
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err.seek(0)
    return int(ended.value.code or 0), err.read()


@pytest.mark.parametrize("name", ["w8a8 [final]", "[red]w8a8", "ünï {name} %s 模型"])
def test_a_name_is_printed_and_used_as_it_is(name: str, work: Path) -> None:
    source, target = work / f"model {name}", work / name
    shutil.copytree(work / "model", source)
    said = smoothquant("quantize", source, "-o", target, "--calib", work / "text.txt", *SMALL).stdout
    assert f"Saved to {target}" in said.replace("\n", "")
    assert len(re.findall(re.escape(name), said)) >= 3  # also in the commands to run next
    assert f"# {name}\n" in (target / "README.md").read_text(encoding="utf-8")
    page = work / f"page {name}.html"
    assert f"Report: {page}" in smoothquant("report", target, "-o", page).stdout
    shown = smoothquant("compare", source, target, "--text", work / "text.txt", *SMALL, "--rounds", "0").stdout
    assert all(f"{word} " in shown for word in name.split())  # the table may break it at spaces


def test_a_name_that_closes_a_tag(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    said = smoothquant("quantize", "model", "-o", "x[/bold]", "--calib", "text.txt", *SMALL).stdout
    assert "Saved to x[/bold]:" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_characters(encoding: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = TextIOWrapper(BytesIO(), encoding=encoding)
    arguments = ("compare", work / "model", work / "w8a8", "--text", work / "text.txt", *SMALL, "--rounds", "0")
    assert main(monkeypatch, out, *arguments)[0] == 0
    out.seek(0)
    text = out.read()
    assert "standard error over windows" in text
    assert ("±:" in text) == (encoding != "ascii")
    code, said = main(monkeypatch, out, "eval", "模 ünï")
    assert code == 2
    assert re.search(r"error: \? \S+ is neither a directory", said)


@pytest.mark.parametrize("columns", ["0", "1", "20", "79"])
def test_a_narrow_terminal_drops_no_digit(columns: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("compare", work / "model", work / "w8a8", "--text", work / "text.txt", *SMALL, "--rounds", "0")
    models = json.loads(smoothquant(*arguments, "--json").stdout)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("smoothquant_ext.cli.support.out", readable(Console(markup=False)))
    shown = smoothquant(*arguments).stdout
    assert "…" not in shown
    for model in models:
        assert f"{model['perplexity']:.3f}" in shown
        assert Path(model["name"]).name in shown


@pytest.mark.parametrize("command", ["eval", "quantize", "info"])
def test_output_that_cannot_be_written(command: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {
        "eval": (work / "w8a8", "--text", work / "text.txt", *SMALL),
        "quantize": (work / "model", "-o", work / "unseen", "--calib", work / "text.txt", *SMALL),
        "info": (),
    }[command]
    with suppress(OSError), Path("/dev/full").open("w", encoding="utf-8") as full:
        code, said = main(monkeypatch, full, command, *arguments)
    assert code == 2
    assert said.splitlines()[-1] == "error: the system: No space left on device"


def test_an_instruction_set_that_does_not_exist(work: Path) -> None:
    command = [sys.executable, "-m", "smoothquant_ext.cli", "quantize", work / "model", "-o", work / "never"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SMOOTHQUANT_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [*command, "--calib", work / "text.txt", *SMALL],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"error: SMOOTHQUANT_CPU_ISA is 'AVX2', expected one of (\w+, )*portable", said)
    assert not (work / "never").exists()


@pytest.mark.parametrize("call", [lambda _: enable(), load, lambda _: quantize(None, [], Recipe())])  # type: ignore[arg-type]
def test_an_instruction_set_that_does_not_exist_in_python(
    call: object,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise RuntimeError("SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable\nframes of C++")

    monkeypatch.setattr("smoothquant_ext.ops.backends.cpu_isa", refuse)
    with pytest.raises(SmoothQuantError, match=r"^SMOOTHQUANT_CPU_ISA is 'mmx', expected one of portable$"):
        call(work / "w8a8")  # type: ignore[operator]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("model", ["model", "w8a8"])
def test_a_pointer_of_git_lfs(model: str, file: str, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / model, tmp_path / "cloned")
    (tmp_path / "cloned" / file).write_text(POINTER)
    expected = f"{tmp_path / 'cloned' / file} is a pointer of Git LFS, not the file itself; run 'git lfs pull' there"
    assert complaint("generate", tmp_path / "cloned", "a").startswith(expected)
    with pytest.raises(SmoothQuantError, match=re.escape(expected)):
        load_model(tmp_path / "cloned")


def test_a_checkpoint_names_no_code_that_it_lacks(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code}))
    smoothquant("quantize", tmp_path / "model", "-o", tmp_path / "out", "--calib", work / "text.txt", *SMALL)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff", "模型测试".encode("gbk")])
def test_a_directory_whose_name_is_no_text(name: bytes, work: Path) -> None:
    target = work / os.fsdecode(name)
    arguments = ("--calib", work / "text.txt", *SMALL)
    said = complaint("quantize", work / "model", "-o", target, *arguments)
    assert said == f"the name {os.fsencode(target)!r} is not UTF-8; choose another directory"
    assert not target.exists()


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_model_that_is_in_8_bits_already(command: str, work: Path) -> None:
    output = ("-o", work / "twice") if command == "quantize" else ()
    said = complaint(command, work / "w8a8", *output, "--calib", work / "text.txt", *SMALL)
    assert said == "LlamaForCausalLM is in 8 bits already; take the model that it was made of"


@pytest.mark.parametrize("file", ["model", "picture.xyz", "picture"])
def test_a_picture_of_no_known_kind_is_refused_before_the_work(file: str, work: Path) -> None:
    said = complaint("inspect", work / "never loaded", "--calib", work / "text.txt", "--plot", work / file)
    assert said == f"--plot is {work / file}, expected a file that ends in .png, .svg, .pdf"


def test_an_empty_quantization_config_is_none(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {}}))
    arguments = ("--max-new-tokens", "4", "--dtype", "float32")
    plain = smoothquant("generate", work / "model", "a", *arguments)
    said = smoothquant("generate", tmp_path / "model", "a", *arguments)
    assert said.stdout == plain.stdout
    assert "quantization_config is empty, so the model is in floating point" in said.stderr
