"""Where checkpoints are saved, and what happens where they cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny_w8a8 import assert_same_model, config_of, logits, quantized

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.errors import SmoothQuantError


def test_saving_over_the_directory_that_was_loaded(tmp_path: Path) -> None:
    saving.save(quantized("llama"), tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    expected = logits(loaded)
    saving.save(loaded, tmp_path / "model", format="lmdeploy")
    assert torch.equal(logits(loaded), expected)  # its floats may still be mapped from the file that is gone
    assert torch.equal(logits(loading.load(tmp_path / "model")), expected)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match="LlamaForCausalLM has no quantized layer; call quantize"):
        saving.save(tiny.build("llama"), tmp_path / "model")
    model = quantized("llama")
    model.model.layers[1].mlp.up_proj.weight_scale[3] = float("nan")
    with pytest.raises(
        SmoothQuantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale is not positive and finite"
    ):
        saving.save(model, tmp_path / "model")
    model = quantized("llama")
    model.model.norm.to("meta")
    with pytest.raises(SmoothQuantError, match=r"model\.norm\.weight is offloaded"):
        saving.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_destinations(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert saving.check_destination(target) == target
    assert saving.check_destination(tmp_path / "new" / "model") == tmp_path / "new" / "model"
    target.mkdir()
    saving.check_destination(target)
    saving.save(quantized("llama", "int8"), target)
    saving.check_destination(target)
    model = quantized("llama", "fp8")
    saving.save(model, target)
    assert_same_model(loading.load(target), model)

    link = tmp_path / "link"
    link.symlink_to(target)
    saving.save(quantized("llama", "int8"), link)
    assert link.is_symlink()
    assert config_of(target)["quantization_config"]["format"] == "int-quantized"

    (target / "notes.md").write_text("mine")
    with pytest.raises(SmoothQuantError, match=r"model already holds notes\.md; choose an empty or a new directory"):
        saving.save(model, target)
    (target / "notes.md").unlink()
    (target / "below").mkdir()
    with pytest.raises(SmoothQuantError, match="already holds below"):
        saving.check_destination(target)
    with pytest.raises(SmoothQuantError, match=r"config\.json is a file; name a directory"):
        saving.check_destination(target / "config.json")


def test_a_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *arguments: False)  # root may read and write anywhere
    with pytest.raises(SmoothQuantError, match="is not readable and writable"):
        saving.check_destination(tmp_path)


def test_a_float_model_is_not_replaced(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(SmoothQuantError, match="already holds something that is not a W8A8 checkpoint"):
        saving.check_destination(tmp_path / "float")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "results.json").write_text("{}")
    with pytest.raises(SmoothQuantError, match=r"data already holds results\.json"):
        saving.check_destination(tmp_path / "data")
    (tmp_path / "data" / "results.json").rename(tmp_path / "data" / "config.json")
    with pytest.raises(SmoothQuantError, match="already holds something that is not a W8A8 checkpoint"):
        saving.check_destination(tmp_path / "data")


# Saves into PLACE/model from a child for each place where it is to die, since importing takes longer than all else.
SAVE_AND_DIE = """
import os, resource, signal, sys
from pathlib import Path
from smoothquant_ext.checkpoint import loading, saving

def die_in(name, calls):
    function, left = getattr(saving, name), [calls]
    def dying(*arguments, **options):
        function(*arguments, **options)
        left[0] -= 1
        if not left[0]:
            os._exit(9)
    setattr(saving, name, dying)

def fill_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

root = Path(sys.argv[1])
ways = {
    "weights": lambda: die_in("save_file", 3),
    "configs": lambda: die_in("_write_configs", 1),
    "full disk": fill_disk,
}
for place, prepare in ways.items():
    child = os.fork()
    if child == 0:
        try:
            model = loading.load(root / "source")
            prepare()
            saving.save(model, root / place / "model", format="lmdeploy", max_shard_size="20KB")
        except Exception as error:
            print(place, type(error).__name__, error, sep=": ", flush=True)
        os._exit(0)
    print(place, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ", flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder in which a save died at each place, two of them over a checkpoint, and what the saves printed."""
    root = tmp_path_factory.mktemp("killed")
    for place in ("source", "weights/model", "configs/model"):
        saving.save(quantized("llama"), root / place)
    (root / "full disk").mkdir()
    arguments = [sys.executable, "-c", SAVE_AND_DIE, str(root)]
    return root, subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("place", ["weights", "configs"])
def test_a_killed_save_leaves_the_old_checkpoint(place: str, killed: tuple[Path, list[str]]) -> None:
    root, printed = killed
    assert f"{place}: 9" in printed
    model, target = quantized("llama"), root / place / "model"
    assert_same_model(loading.load(target), model)
    (litter,) = [path.name for path in target.parent.iterdir() if path != target]
    assert litter.startswith(".model.saving-")
    saving.save(model, target)
    assert list(target.parent.iterdir()) == [target]


def test_a_full_disk_is_one_sentence(killed: tuple[Path, list[str]]) -> None:
    root, printed = killed
    (sentence,) = [line for line in printed if line.startswith("full disk: SmoothQuantError: ")]
    assert "model could not be written" in sentence
    assert "File too large" in sentence
    assert list((root / "full disk").iterdir()) == []
