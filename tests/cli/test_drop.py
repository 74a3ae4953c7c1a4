"""--drop: every command that loads a model refuses what its class has no place for, and leaves it out by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from model_files import change_tensors, with_zeros, without
from safetensors.torch import load_file

MTP = with_zeros(**{"mtp.fc.weight": (4, 8)})


@pytest.fixture
def faulty(work: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of ``model`` or ``w8a8`` with a tensor too many."""

    def copy(kind: str) -> Path:
        directory = Path(shutil.copytree(work / kind, tmp_path / "faulty" / kind))
        change_tensors(directory, MTP)
        return directory

    return copy


def test_quantize(work: Path, faulty: Callable[[str], Path], tmp_path: Path) -> None:
    model, text = faulty("model"), work / "text.txt"
    portable = ("--format", "compressed-tensors")
    command = ("quantize", model, "-o", tmp_path / "out", "--calib", text, *SMALL, *portable)
    sentence = complaint(*command)
    assert sentence == (
        f"{model} holds 1 tensor that LlamaForCausalLM has no place for: mtp.fc.weight; leave it out with "
        "--drop 'mtp.*', in Python drop=['mtp.*']"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faulty"]
    smoothquant(*command, "--drop", "mtp.*")
    expected, stored = (load_file(path / "model.safetensors") for path in (work / "w8a8", tmp_path / "out"))
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["model", "w8a8"])
@pytest.mark.parametrize(
    "command",
    [
        ("eval", "{}", "--text", "{text}", *SMALL),
        ("compare", "{}", "{}", "--text", "{text}", "--rounds", "0", *SMALL),
        ("generate", "{}", "abc", "--max-new-tokens", "2"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_run_models(
    command: tuple[str, ...], kind: str, work: Path, faulty: Callable[[str], Path]
) -> None:
    filled, same = (
        [word.replace("{}", str(path)).replace("{text}", str(work / "text.txt")) for word in command]
        for path in (faulty(kind), work / kind)
    )
    assert "leave it out with --drop 'mtp.*'" in complaint(*filled)
    answer = smoothquant(*filled, "--drop", "mtp.*").stdout
    assert answer == smoothquant(*same).stdout


def test_the_other_commands(work: Path, faulty: Callable[[str], Path]) -> None:
    model, text = faulty("model"), work / "text.txt"
    inspect = ("inspect", model, "--calib", text, *SMALL)
    report = ("report", work / "w8a8", "--base", model, "--text", text, *SMALL)
    for command in (inspect, report):
        assert "leave it out with --drop 'mtp.*'" in complaint(*command)
    smoothquant(*inspect, "--drop", "mtp.*")


def test_several_patterns(faulty: Callable[[str], Path]) -> None:
    model = faulty("model")
    change_tensors(model, with_zeros(**{"vision.a.weight": (1,), "vision.b.weight": (1,)}))
    command = ("generate", model, "abc", "--max-new-tokens", "1")
    assert "holds 2 tensors" in complaint(*command, "--drop", "mtp.*")
    smoothquant(*command, "--drop", "mtp.*", "--drop", "vision.*")


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_servers(command: str, work: Path, faulty: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' server loads the model; it is stopped where it would begin to listen."""
    pytest.importorskip("fastapi")
    from smoothquant_ext.integrations import serving

    loaded: list[type] = []

    def start(model: str, *_: object, **__: object) -> None:
        from transformers import AutoModelForCausalLM

        loaded.append(type(AutoModelForCausalLM.from_pretrained(model)))
        raise SystemExit(0)

    monkeypatch.setattr(serving, "_start", start)
    model = faulty("model")
    assert "leave it out with --drop 'mtp.*'" in complaint(command, model)
    smoothquant(command, model, "--drop", "mtp.*")
    assert [kind.__name__ for kind in loaded] == ["LlamaForCausalLM"]
    change_tensors(model, without("model.norm.weight"))
    assert "lacks 1 tensor that its configuration calls for: model.norm.weight" in complaint(command, model)
    assert "is neither a directory here nor a model on the hub" in complaint(command, "./someone/something")
