"""The state of a search: an interrupted run resumes where it stopped, and nothing else is ever taken from it."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.quantization import block_quantizer
from smoothquant_ext.quantization.alpha_search import Trial
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.report import Report
from smoothquant_ext.quantization.resume import SearchState, fingerprint
from smoothquant_ext.quantization.sensitivity import Sensitivity

DATA = [tiny.token_ids(1, 12, seed) for seed in range(6)]
RECIPES = {
    "int8": Recipe(alpha="auto"),
    "int8-static": Recipe("int8-static", alpha="auto"),
    "explicit": Recipe(alpha="auto", explicit=True, rounding="nearest"),
    "clipping": Recipe("int8-static", clipping="auto"),
    "skipping": Recipe("int8-static", alpha="auto", auto_skip=3),
}


@functools.cache
def uninterrupted(kind: str) -> nn.Module:
    return run(kind, None)


def build(kind: str) -> nn.Module:
    model = tiny.build("gpt2" if kind == "explicit" else "llama")
    if kind != "explicit":
        tiny.amplify_outliers(model)
    return model


def run(kind: str, journal: Path | None, model: nn.Module | None = None, data: list[Tensor] = DATA) -> nn.Module:
    return quantize(model or build(kind), data, RECIPES[kind], progress=False, journal=journal)


class Counter:
    """Counts what a method does, and raises in its place at a certain call."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type | object, name: str, fails_at: int | None = None) -> None:
        self.count = 0
        original = getattr(owner, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            if self.count == fails_at:
                raise KeyboardInterrupt
            self.count += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, wrapper)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value.float(), second[name].float()), name
    one: Report = a.smoothquant_report
    other: Report = b.smoothquant_report
    for field in ("groups", "skipped", "sensitivity", "blocks", "quantized"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.to_record()["layers"] == other.to_record()["layers"]


@pytest.mark.parametrize("kind", RECIPES)
def test_an_interrupted_run_goes_on_and_ends_the_same(kind: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        whole = Counter(patch, Trial, "block_error")
        expected = run(kind, tmp_path)
        assert whole.count > 4
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, Trial, "block_error", fails_at=whole.count - 2)  # in the middle of the second block
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path)
    kept = 1 if RECIPES[kind].rounding == "nearest" else 2  # what was searched, and what was rounded
    assert len(list(tmp_path.rglob("*.safetensors"))) == kept
    with pytest.MonkeyPatch.context() as patch:
        rest = Counter(patch, Trial, "block_error")
        resumed = run(kind, tmp_path)
        assert rest.count < 0.7 * whole.count
    assert_same(resumed, expected)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
@pytest.mark.parametrize("rotate", ["none", "inputs"])
def test_rounded_weights_are_not_rounded_again(scheme: str, rotate: str, tmp_path: Path) -> None:
    def rounded(journal: Path | None, fails_at: int | None = None) -> tuple[nn.Module | None, int]:
        with pytest.MonkeyPatch.context() as patch:
            calls = Counter(patch, block_quantizer, "round_weight", fails_at)
            try:
                recipe = Recipe(scheme, rounding="gptq", rotate=rotate)
                return quantize(build("int8"), DATA, recipe, progress=False, journal=journal), calls.count
            except KeyboardInterrupt:
                return None, calls.count

    expected, layers = rounded(None)
    assert expected is not None
    assert rounded(tmp_path, layers - 3) == (None, layers - 3)
    resumed, rest = rounded(tmp_path)
    assert rest == layers // 2, "those of the second block"
    assert resumed is not None
    assert_same(resumed, expected)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_measured_layers_are_not_measured_again(tmp_path: Path) -> None:
    kind = "skipping"
    expected = uninterrupted(kind)
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, Sensitivity, "kl", fails_at=5)
        with pytest.raises(KeyboardInterrupt):
            run(kind, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        trials, measured = Counter(patch, Trial, "block_error"), Counter(patch, Sensitivity, "kl")
        resumed = run(kind, tmp_path)
    assert trials.count == 0
    assert measured.count < len(expected.smoothquant_report.sensitivity)
    assert_same(resumed, expected)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results for all blocks of the recipe ``int8``."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        Counter(patch, block_quantizer.BlockQuantizer, "apply_", fails_at=1)
        with pytest.raises(KeyboardInterrupt):
            run("int8", folder)
    assert len(list(folder.rglob("*.safetensors"))) == 3  # two searched, one rounded
    return folder


@pytest.fixture
def journal(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(interrupted, tmp_path / "journal")


def other_weights() -> nn.Module:
    model = build("int8")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    return model


OTHERS = {
    "recipe": lambda path: run("int8-static", path),
    "model": lambda path: run("int8", path, other_weights()),
    "calibration": lambda path: run("int8", path, data=[*DATA[:-1], tiny.token_ids(1, 12, 99)]),
    "less calibration": lambda path: run("int8", path, data=DATA[:3]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_run_ignores_it(kind: str, journal: Path) -> None:
    left = sorted(journal.rglob("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        fresh = Counter(patch, Trial, "block_error")
        expected = OTHERS[kind](None)
        count, fresh.count = fresh.count, 0
        assert_same(OTHERS[kind](journal), expected)
        assert fresh.count == count
    assert sorted(journal.rglob("*.safetensors")) == left


def test_the_same_run_takes_it_all(journal: Path) -> None:
    expected = uninterrupted("int8")
    with pytest.MonkeyPatch.context() as patch:
        searched = Counter(patch, Trial, "block_error")
        assert_same(run("int8", journal), expected)
    assert searched.count == 0


DAMAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "not a number": lambda content: b"\xff" * len(content),
    "text": lambda content: b"{}",
    "no facts": lambda content: content.replace(b'"facts"', b'"other"'),
    "facts that are no JSON": lambda content: content.replace(b'{\\"alphas', b'[\\"alphas'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_counts_as_none(damage: str, journal: Path) -> None:
    contents = {file: file.read_bytes() for file in journal.rglob("*.safetensors")}
    for file, content in contents.items():
        file.write_bytes(DAMAGE[damage](content))
    assert any(file.read_bytes() != content for file, content in contents.items())
    assert_same(run("int8", journal), uninterrupted("int8"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = SearchState(tmp_path / "a" / "b")
    assert state.read("x") is None
    tensors = {"0": torch.rand(5), "1": torch.rand(3, 4).t(), "2": torch.tensor([1e-45, torch.inf])}
    facts = {"alphas": [None, 0.35, 0.1 + 0.2], "limits": {"a.b": 1 / 3}}
    state.write("x.0", tensors, facts)
    state.write("x.1", {}, {})
    state.write("", {}, {"kl": 5e-324})
    read = state.read("x.0")
    assert read is not None
    assert read[1] == facts
    assert read[0].keys() == tensors.keys()
    assert all(torch.equal(read[0][key], tensor) for key, tensor in tensors.items())
    assert state.read("x.1") == ({}, {})
    assert state.read("") == ({}, {"kl": 5e-324})
    state.write("x.0", {}, {"new": 1})
    assert state.read("x.0") == ({}, {"new": 1})
    state.remove()
    assert not state.folder.exists()  # type: ignore[union-attr]
    state.remove()


def test_without_a_folder_nothing_is_kept() -> None:
    state = SearchState(None)
    state.write("x", {"0": torch.ones(1)}, {})
    assert state.read("x") is None
    state.remove()


def test_a_write_that_fails_says_so_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = SearchState(tmp_path / "state")
    state.write("x", {}, {"old": 1})

    def full(_tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("smoothquant_ext.quantization.resume.save_file", full)
    with pytest.raises(SmoothQuantError, match=r"cannot be written to \(No space left"):
        state.write("x", {}, {"new": 1})
    assert state.read("x") == ({}, {"old": 1})
    (tmp_path / "file").touch()
    with pytest.raises(SmoothQuantError, match="cannot be written to"):
        SearchState(tmp_path / "file").write("x", {}, {})
    assert SearchState(tmp_path / "file").read("x") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fingerprint_is_the_same_for_the_same_alone(dtype: torch.dtype) -> None:
    def print_of(model: nn.Module, absmax: Tensor, settings: str = "a") -> str:
        return fingerprint(model, {"layer": absmax}, settings)

    model, absmax = tiny.build("llama", dtype), torch.rand(7)
    first = print_of(model, absmax)
    assert first == print_of(tiny.build("llama", dtype), absmax.clone())
    assert len(first) == 16
    assert int(first, 16) >= 0
    prints = {
        first,
        print_of(model, absmax, "b"),
        print_of(model, absmax * (1 + 2**-20)),
        print_of(model, absmax[:6]),
        print_of(tiny.build("llama", dtype, seed=1), absmax),
        print_of(tiny.build("llama", dtype, num_hidden_layers=1), absmax),
        fingerprint(model, {"other": absmax}, "a"),
    }
    assert len(prints) == 7
