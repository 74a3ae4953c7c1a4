"""A CUDA device for a torch without CUDA: what a GPU changes in Python and in the ops, without the speed.

Tensors on it lie in host memory and torch computes on them with its CPU kernels, see
tests/native/emulation/torch_device.cpp; our ops run their own host code and kernels there, see emulate.h. A tensor of
the CPU beside one of this device is an error, as on a GPU. It has no streams, graphs, generators and no backward pass.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from emulation import emulated_library, torch_device

from smoothquant_ext.ops import library as libraries
from smoothquant_ext.ops.cuda import machine, settle

NAME = "Emulated GPU"
ARCHS = "80+PTX 89 90a 100a 120"
DEFAULT_WAYS = "8=skinny,library,torch;=library,skinny,torch"  # those of csrc/cuda/compute/ways.h
_loaded: set[str] = set()


def load_once(library: Any) -> None:
    """Loads a library of ops: what it registers stays."""
    if str(library) not in _loaded:
        torch.ops.load_library(library)
        _loaded.add(str(library))


@contextlib.contextmanager
def emulated_cuda(arch: int = 90, memory: int = 80 << 30, settled: bool = True) -> Iterator[None]:
    """``torch.device("cuda")`` can be used: one GPU, of this architecture and so many bytes.

    Args:
        arch: 90 for compute capability 9.0.
        memory: bytes.
        settled: whether our kernels run without a proof; otherwise the ops are as ``unsettled`` makes them.
    """
    load_once(torch_device())
    load_once(emulated_library())
    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.dict("os.environ", {"SQ_EMULATED_ARCH": str(arch)}))
        patches.enter_context(patch.object(torch.version, "cuda", "13.0"))
        for name, value in functions_of(arch, memory).items():
            patches.enter_context(patch.object(torch.cuda, name, value))
        patches.enter_context(patch.object(torch.UntypedStorage, "clone", clone_of_storage, create=True))
        patches.enter_context(unsettled())
        if settled:
            settle.trust_all()
        yield


def functions_of(arch: int, memory: int) -> dict[str, Any]:
    """What ``torch.cuda`` says of the device."""
    major, minor = divmod(arch, 10)
    properties = SimpleNamespace(
        name=NAME, major=major, minor=minor, total_memory=memory, multi_processor_count=3, L2_cache_size=32 << 20
    )
    answers: dict[str, Any] = {
        "current_device": 0,
        "device_count": 1,
        "empty_cache": None,
        "get_device_capability": (major, minor),
        "get_device_name": NAME,
        "get_device_properties": properties,
        "get_rng_state": torch.empty(0),
        "is_available": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "is_initialized": True,
        "manual_seed_all": None,
        "max_memory_allocated": 0,
        "mem_get_info": (memory, memory),
        "memory_allocated": 0,
        "memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "set_device": None,
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
    }
    return {name: function_that_answers(answer) for name, answer in answers.items()}


def clone_of_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """As torch's own, which cannot make a storage on this device."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole.clone().untyped_storage()


def function_that_answers(answer: Any) -> Any:
    """A new function each time: torch.compile has a table of torch's by identity."""
    return lambda *_args, **_kwargs: answer


@contextlib.contextmanager
def unsettled(library: Path | None = None) -> Iterator[settle._State]:
    """On the emulated device, the ops as they are in a process that has not used a GPU yet.

    Args:
        library: the compiled CUDA library; a path that does not exist is a package without one.
    """
    state = settle._State()
    path = library or emulated_library()

    def load(wanted: Path) -> None:
        """The library is loaded already, below the doors: what they hide appears without them."""
        if not wanted.is_file():
            raise ImportError(f"there is no {wanted}")
        for doors in state.registered:
            doors._destroy()

    archs = os.environ.get("SQ_EMULATED_ARCHS") or ARCHS
    none = libraries.Built("", "", "built without CUDA kernels: no nvcc")
    built = libraries.Built(archs, "13.0", "") if path.is_file() else none
    with (
        patch.object(settle, "_state", state),
        patch.object(libraries, "CUDA", path),
        patch.object(libraries, "built", lambda: built),
        patch.object(libraries, "load", load),
        patch.object(machine, "driver_version", lambda: 13000),
    ):
        settle.start()
        try:
            yield state
        finally:
            for registered in state.registered:
                registered._destroy()
            torch.ops.sq._set_cuda_ways("int8", DEFAULT_WAYS)
            torch.ops.sq._set_cuda_ways("fp8", DEFAULT_WAYS)
