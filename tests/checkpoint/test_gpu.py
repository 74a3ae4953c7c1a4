"""Checkpoints and a GPU, an emulated one: read straight to it, and written alike from both devices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_text import tiny_tokenizer
from tiny_w8a8 import quantized, same_bits
from torch import nn
from transformers import AutoModelForCausalLM

from smoothquant_ext import devices
from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.devices import loaded_on, move_
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.integrations import from_pretrained
from smoothquant_ext.models import load_model
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe

IDS = tiny.token_ids()
GPU = torch.device("cuda:0")


@pytest.fixture(params=["accelerate", "no accelerate"])
def accelerate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With accelerate installed, and without."""
    if request.param == "no accelerate":
        monkeypatch.setattr(devices, "is_accelerate_available", lambda: False)


def assert_on_gpu(model: nn.Module) -> None:
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {GPU}


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    """Every bit of the tensors. Outputs within what 8 bits leave: fused modules of the CPU round less often."""
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(same_bits(state[name].cpu(), value) for name, value in expected.state_dict().items())
    with torch.no_grad():
        actual, wanted = model(IDS.cuda()).logits.cpu(), expected(IDS).logits
    assert float((actual - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.usefixtures("gpu", "accelerate")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_is_loaded_to_the_gpu(architecture: str, tmp_path: Path) -> None:
    saving.save(quantized(architecture, "int8"), tmp_path / "model")
    model = loading.load(tmp_path / "model", "cuda")
    assert_on_gpu(model)
    assert_same(model, loading.load(tmp_path / "model"))


@pytest.mark.usefixtures("gpu")
def test_transformers_loads_it_there(tmp_path: Path) -> None:
    saving.save(quantized("llama", "int8"), tmp_path / "model")
    from_pretrained.enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cuda")
    finally:
        from_pretrained.disable()
    assert_on_gpu(model)
    assert_same(model, loading.load(tmp_path / "model"))


@pytest.mark.usefixtures("gpu", "accelerate")
def test_a_model_in_floating_point_is_loaded_there(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cuda")
    assert_on_gpu(model)
    assert_same(model, tiny.build("llama"))


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.usefixtures("gpu")
def test_a_model_too_large_for_the_gpu_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(options: Any) -> str:
        asked.append(options)
        if options["device_map"] != "auto":
            full()
        return "spread"

    with pytest.warns(UserWarning, match="larger than the free memory of cuda: a part stays in main memory"):
        assert loaded_on("cuda", load) == "spread"
    assert asked == [{"device_map": {"": torch.device("cuda")}}, {"device_map": "auto"}]


@pytest.mark.usefixtures("gpu")
def test_without_accelerate_a_model_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_accelerate_available", lambda: False)
    assert loaded_on("cuda", dict) == {}
    model = tiny.build("llama")
    assert not move_(model, None)
    assert not move_(model, "cpu")
    assert move_(model, "cuda")
    assert_on_gpu(model)
    assert not move_(model, "cuda:0")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert not move_(model, "cpu")
    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(SmoothQuantError, match=r"for another 2 GiB: pip install accelerate"):
        move_(tiny.build("llama"), "cuda")


@pytest.mark.usefixtures("gpu")
def test_the_cpu_needs_no_accelerate() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [loaded_on(device, dict) for device in (None, "cpu", torch.device("cpu"))] == [{}] * 3


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("scheme", ["int8", "fp8-static"])
def test_files_of_both_devices_are_equal(scheme: str, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        model = tiny.build("llama")
        model.set_attn_implementation("eager")
        quantize(model, [IDS], Recipe(scheme), progress=False, device=device)
        assert model.device.type == device
        saving.save(model, tmp_path / device, tiny_tokenizer())
    files = {file.name for file in (tmp_path / "cpu").iterdir()} - {"smoothquant.json", "README.md"}  # have durations
    assert {"config.json", "model.safetensors"} <= files
    for name in files:
        assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes(), name
