"""The names of devices."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated_cuda

from smoothquant_ext.devices import free_memory, full_float32, memory_explained, named_device
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


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB",
            "the GPU's memory is too small for another 2.50 GiB: use less",
        ),
        ("Allocation failed", "the GPU's memory is too small: use less"),
    ],
)
def test_full_memory_is_a_sentence(said: str, expected: str) -> None:
    with pytest.raises(SmoothQuantError) as caught, memory_explained("use less"):
        raise torch.OutOfMemoryError(said)
    assert str(caught.value) == expected
    with pytest.raises(RuntimeError, match="another"), memory_explained("use less"):
        raise RuntimeError("another")


def test_float32_is_not_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(ZeroDivisionError), full_float32():
            1 / 0  # noqa: B018
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_that_torch_holds_ready_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_cuda(memory=1000):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
        assert free_memory(torch.device("cuda")) == 1200
