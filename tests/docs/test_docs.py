"""The documentation is true: its commands and its Python are run, on a tiny model in place of the real one."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import write_ops
from command_line import smoothquant
from emulated_cuda import emulated_cuda
from op_cases import public_ops
from pages import ROOT, blocks, ops_example
from server import TEMPLATE, served
from tiny_media import minilm_directory, write_images, write_other, write_sounds
from tiny_text import some_text, tiny_tokenizer

# What takes the place of each model on the hub.
HUB = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "original",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm",
    "openai/whisper-tiny": "whisper",
    "google/vit-base-patch16-224": "vit",
    "openai/clip-vit-base-patch32": "clip",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PORT = "8000"

# What is not run here, and why. `make` targets must exist; CI runs those of the README.
ELSEWHERE = {
    "pip": "changes the environment",
    "make": "sets up environments, or runs this test",
    "vllm": "another engine; benchmarks/engines.py runs it",
    "lmdeploy": "another engine, which needs a GPU",
    "python -m sglang.launch_server": "another engine, which needs a GPU",
    "benchmarks/gpu_acceptance.sh": "needs a GPU",
    "smoothquant prove": "needs a GPU; tests/cli/test_prove.py runs it on an emulated one",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the texts and the checkpoint that the pages talk of."""
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny.build("llama", max_position_embeddings=2048)
    tiny.amplify_outliers(model)
    model.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    (folder / "book.txt").write_text(some_text(12_000))
    (folder / "other.txt").write_text(some_text(9_000, seed=1))
    quantize = ("quantize", folder / "original", "--calib", folder / "book.txt", *SMALL)
    smoothquant(*quantize, "-o", folder / "smol-w8a8")
    smoothquant(*quantize, "-o", folder / "smol-ct", "--format", "compressed-tensors")
    smoothquant(*quantize, "-o", folder / "smol-r4", "--rotate", "inputs", "--format", "compressed-tensors")
    (folder / "minilm").symlink_to(minilm_directory())
    write_other("WhisperForConditionalGeneration", folder / "whisper")
    write_other("ViTForImageClassification", folder / "vit")
    write_other("CLIPModel", folder / "clip")
    write_sounds(folder / "recordings")
    write_images(folder / "photos")
    smoothquant("quantize", folder / "minilm", "--calib", folder / "book.txt", *SMALL, "-o", folder / "minilm-w8a8")
    return folder


SMALL = ("--samples", "4", "--seqlen", "48")  # in place of thousands of tokens
FAST = {"compare": ("--rounds", "1", "--prefill", "8", "--decode", "2")}


@pytest.fixture
def here(place: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(place)
    yield place
    os.chdir(before)


def commands(page: Path) -> list[str]:
    """The lines after a prompt, without their remarks."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+# .*", "", line[2:]) for line in lines]


def local(text: str) -> str:
    """With the models of the hub replaced by those in the folder."""
    for model, directory in HUB.items():
        text = text.replace(model, directory)
    return text


def cases(what: Any) -> list[Any]:
    return [
        pytest.param(page, each, id=f"{page.stem}-{index}") for page in PAGES for index, each in enumerate(what(page))
    ]


@pytest.mark.parametrize(("page", "command"), cases(commands))
def test_command(page: Path, command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *arguments = shlex.split(local(command).replace("MODEL", "original"))
    if any(command.startswith(known) for known in ELSEWHERE):
        if name == "make":
            assert re.search(rf"^{arguments[0]}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert name == "smoothquant", f"{page.name}: {command} is run nowhere"
    command, *options = arguments
    if command in ("serve", "chat"):  # which do not end by themselves: see below, and test_serving.py
        smoothquant(command, "--help")
        return
    if command in ("quantize", "compare", "eval", "inspect"):
        options += [option for option in SMALL if "--samples" not in options]
    with emulated_cuda() if "cuda" in options else nullcontext():
        smoothquant(command, *options, *FAST.get(command, ()))


@pytest.mark.parametrize(("page", "code"), cases(lambda page: blocks(page, "python")))
def test_python(page: Path, code: str, here: Path) -> None:
    code = local(code).replace("samples=128, seqlen=512", "samples=4, seqlen=48")
    if f":{PORT}/" in code:
        with served(here / "smol-w8a8") as (client, _, _):
            exec(code.replace(f":{PORT}/", f":{client.base_url.port}/"), {})
        return
    exec(code, {})


def test_the_example_of_the_ops_needs_no_other_import(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", ops_example()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert re.fullmatch(r"\(4, 32\), relative error 0\.0[01]\d\d\n", done.stdout)


def test_the_architecture_lists_the_package_in_the_order_of_its_imports() -> None:
    contract = re.search(r"^layers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert contract is not None
    layers = [re.findall(r"\w+", line) for line in contract[1].splitlines() if line.strip()]
    picture = blocks(ROOT / "docs" / "architecture.md", "text")[0]
    places = [[re.search(rf"\b{name}(/|\.py)", picture) for name in names] for names in layers]
    assert all(place for row in places for place in row)
    starts = [[place.start() for place in row if place] for row in places]
    assert all(max(above) < min(below) for above, below in itertools.pairwise(starts))


def test_every_command_is_shown() -> None:
    shown = {command.split()[1] for page in PAGES for command in commands(page) if command.startswith("smoothquant ")}
    assert shown == {
        "quantize", "convert", "compare", "eval", "generate", "chat", "serve", "inspect", "report", "info", "prove",
    }  # fmt: skip
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 7


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("generator", ["write_accuracy", "write_kv_cache", "write_performance"])
def test_a_page_of_measurements_is_current(generator: str) -> None:
    written = importlib.import_module(generator)
    assert written.TARGET.read_text(encoding="utf-8") == written.page(), f"run tools/{generator}.py"


def test_the_reference_of_the_ops_is_current() -> None:
    assert write_ops.TARGET.read_text(encoding="utf-8") == write_ops.page(), "run make docs"
    documented = set(re.findall(r"^### `(\w+)`", write_ops.page(), re.MULTILINE))
    assert documented == public_ops()
