"""The benchmark of whole models on a GPU, as far as it needs none."""

from __future__ import annotations

import sys
from pathlib import Path

import gpu_model
import pytest
import torch


@pytest.mark.usefixtures("gpu")
def test_every_record_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the emulated device, where the times mean nothing."""
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(gpu_model.SHAPES, "tiny", tiny | {"num_key_value_heads": 2, "vocab_size": 100})
    monkeypatch.setattr(gpu_model, "BATCHES", (2,))
    monkeypatch.setattr(gpu_model, "PROMPT", 8)
    monkeypatch.setattr(gpu_model, "ANSWER", 3)
    monkeypatch.setattr(gpu_model, "ROUNDS", 1)
    monkeypatch.setattr(gpu_model, "POSITIONS", 64)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which wants a compiler for GPUs
    records = list(gpu_model.measure(["tiny"], ["int8"]))
    assert [(each["model"], each["mode"]) for each in records] == [
        ("bf16", "eager"),
        ("int8", "eager"),
        ("bf16", "static"),
        ("int8", "static"),
    ]
    assert all(rate > 0 for each in records if each["mode"] == "eager" for rate in each["tokens_per_second"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", str(tmp_path / "out.jsonl")])
    assert gpu_model.main() == 2
    assert capsys.readouterr().err == "gpu_model: torch sees no GPU here; 'smoothquant info' says why\n"
    assert not (tmp_path / "out.jsonl").exists()
