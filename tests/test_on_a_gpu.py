"""What a user does on a GPU, with our kernels proven, refused and absent, on the emulated device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from emulated_cuda import NAME, emulated_cuda, unsettled
from emulation import ROOT
from tiny_text import tiny_tokenizer
from tiny_w8a8 import IDS, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import smoothquant_ext
from smoothquant_ext import load, ops, quantize, save
from smoothquant_ext.ops.cuda import proof
from smoothquant_ext.ops.cuda.families import families_of
from smoothquant_ext.ops.cuda.machine import Gpu
from smoothquant_ext.ops.cuda.records import RIGHT, WRONG, Record, Verdict

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(params=["proven", "refused", "absent"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """A process that has not used its GPU yet, and what it will find there."""
    state: str = request.param
    kind = WRONG if state == "refused" else RIGHT
    verdicts = {family: Verdict(kind) for family in families_of(90, "80 90a")}
    library = Path("/nowhere/_C_cuda.so") if state == "absent" else None
    with emulated_cuda(), unsettled(library):
        record = Record(proof.key_of(Gpu(NAME, 90)), "2026-12-01", verdicts, ())
        with patch.object(proof, "proven", lambda *_: record):
            yield state


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An INT8 checkpoint."""
    save(quantized("llama"), tmp_path / "model", tiny_tokenizer())
    return tmp_path / "model"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(IDS.to(model.device), use_cache=False).logits
    assert output.device == model.device
    return output.cpu()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Torch's norms and activations may move a value of the next layer's input to the next step of INT8."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 0.02


def check(model: Any, expected: Tensor, kernels: str) -> None:
    assert model.device.type == "cuda"
    assert_near(logits(model), expected)
    replaced = ops.settle().replaced
    assert ("w8a8_linear" in replaced) == (kernels != "proven")
    prompt = IDS[:1].to("cuda")
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        tokens = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
        assert tokens.shape == (1, IDS.shape[1] + 4)


def test_load_and_move(kernels: str, directory: Path) -> None:
    expected = logits(load(directory))
    check(load(directory).to("cuda"), expected, kernels)
    check(load(directory, device="cuda"), expected, kernels)


def test_from_pretrained(kernels: str, directory: Path) -> None:
    pytest.importorskip("accelerate")
    expected = logits(load(directory))
    smoothquant_ext.enable()
    try:
        check(AutoModelForCausalLM.from_pretrained(directory, device_map="cuda"), expected, kernels)
    finally:
        smoothquant_ext.disable()


def test_quantize(kernels: str, tmp_path: Path) -> None:
    expected = logits(quantize(tiny.build("llama"), IDS, progress=False))
    model = quantize(tiny.build("llama").to("cuda"), IDS.to("cuda"), progress=False)
    check(model, expected, kernels)
    save(model, tmp_path / "made")
    assert_near(logits(load(tmp_path / "made")), expected)
