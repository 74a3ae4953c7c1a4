"""The names of devices."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated_cuda

from smoothquant_ext.devices import named_device
from smoothquant_ext.errors import SmoothQuantError


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "expected"), [("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_names_with_a_gpu(name: str, expected: str) -> None:
    assert named_device(name) == torch.device(expected)
    assert named_device(torch.device(expected)) == torch.device(expected)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "mps", "meta", "", "CPU", "cuda:0 "])
def test_other_names(name: str) -> None:
    with pytest.raises(SmoothQuantError, match="expected auto, cpu, cuda or a GPU's number"):
        named_device(name)


@pytest.mark.usefixtures("gpu")
def test_a_number_beyond_the_last_gpu() -> None:
    with pytest.raises(SmoothQuantError, match="the last of the GPUs here is cuda:0"):
        named_device("cuda:1")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named_device("auto") == torch.device("cpu")
    with emulated_cuda():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SmoothQuantError, match="finds no GPU here"):
            named_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SmoothQuantError, match="built without CUDA"):
        named_device("cuda:0")
