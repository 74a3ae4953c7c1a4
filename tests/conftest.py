"""What every test may ask for: devices, and the backends that ops run on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("MKL_CBWR", "AUTO")  # else the last bits of a product depend on where its operands lie

import pytest
import torch
from emulated_cuda import emulated_cuda, left_behind
from op_testing import HAS_CUDA, ISAS, cpu_isa, run_on

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that this machine and this torch have."""
    device: str = request.param
    return device


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each CPU instruction set in turn."""
    with cpu_isa(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, *(["cuda"] if HAS_CUDA else [])])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to run ops on, the CPU with each of its instruction sets in turn."""
    if request.param == "cuda":
        yield "cuda"
        return
    with cpu_isa(request.param):
        yield "cpu"


@pytest.fixture
def run(backend: str) -> Callable[..., Any]:
    """``run(op, ...)``: the op on every backend, with tensors moved there and its results moved back."""
    return functools.partial(run_on, backend)


@pytest.fixture(autouse=True)
def _nothing_emulated_is_left() -> Iterator[None]:
    yield
    assert not left_behind()


@pytest.fixture
def gpu() -> Iterator[None]:
    """A CUDA device, emulated; see ``emulated_cuda``."""
    with emulated_cuda():
        yield
