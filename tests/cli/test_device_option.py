"""``--device`` of the commands that quantize and measure, on an emulated GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from emulated_cuda import emulated_cuda
from safetensors.torch import load_file

from smoothquant_ext.evaluation import accuracy
from smoothquant_ext.probing import blocks

TEXT = ("--samples", "3", "--seqlen", "24")


def test_quantize_on_a_gpu_and_block_by_block(work: Path, tmp_path: Path) -> None:
    said = {}
    for name, memory, device in (("gpu", 80 << 30, "auto"), ("blocks", 1 << 20, "cuda"), ("cpu", 80 << 30, "cpu")):
        with emulated_cuda(memory=memory):
            result = smoothquant(
                "quantize",
                work / "model",
                "-o",
                tmp_path / name,
                "--calib",
                work / "text.txt",
                *SMALL,
                "--device",
                device,
            )
        said[name] = result.stderr
    assert "free on cuda: it moves there" in said["gpu"].replace("\n", " ")
    assert "one block at a time goes there" in said["blocks"].replace("\n", " ")
    assert "cuda" not in said["cpu"]
    gpu, spread, cpu = (load_file(tmp_path / name / "model.safetensors") for name in ("gpu", "blocks", "cpu"))
    assert gpu.keys() == spread.keys() == cpu.keys()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The devices that models are run on."""
    seen = set()
    for module, name in ((accuracy, "device_of"), (blocks, "device_of")):
        original = getattr(module, name)

        def noted(model: object, original: object = original) -> object:
            device = original(model)  # type: ignore[operator]
            seen.add(device.type)
            return device

        monkeypatch.setattr(module, name, noted)
    return seen


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto", "cpu"])
def test_eval(work: Path, devices: set[str], device: str) -> None:
    result = smoothquant(
        "eval", work / "w8a8", "--text", work / "text.txt", "--reference", work / "model", *TEXT, "--json",
        "--device", device,
    )  # fmt: skip
    base, quantized = json.loads(result.stdout)
    assert quantized["kl"] > 0
    assert abs(quantized["perplexity"] / base["perplexity"] - 1) < 0.1
    assert devices == {"cpu" if device == "cpu" else "cuda"}


@pytest.mark.usefixtures("gpu")
def test_compare_and_report(work: Path, devices: set[str], tmp_path: Path) -> None:
    options = ("--text", work / "text.txt", *TEXT, "--rounds", "0", "--device", "cuda")
    smoothquant("compare", work / "model", work / "w8a8", *options)
    assert devices == {"cuda"}
    smoothquant("report", work / "w8a8", "-o", tmp_path / "page.html", "--base", work / "model", *options)
    assert devices == {"cuda"}


def test_inspect(work: Path) -> None:
    tables = []
    for memory, device in ((80 << 30, "cuda"), (1 << 20, "cuda"), (80 << 30, "cpu")):
        with emulated_cuda(memory=memory):
            tables.append(
                smoothquant("inspect", work / "model", "--calib", work / "text.txt", *TEXT, "--device", device).stdout
            )
    assert "→" in tables[0]
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(
    "command",
    [
        ("quantize", "nowhere", "-o", "out"),
        ("eval", "nowhere"),
        ("compare", "nowhere", "nowhere"),
        ("inspect", "nowhere"),
        ("report", "nowhere"),
    ],
    ids=lambda command: command[0],
)
def test_a_gpu_that_is_not_there_is_said_at_once(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert (
        complaint(*command, "--device", "cuda") == "the device is cuda, but this torch is built without CUDA: use cpu"
    )
    assert "expected auto, cpu, cuda or" in complaint(*command, "--device", "tpu")
