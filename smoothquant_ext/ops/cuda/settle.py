"""Settles, once in a process, how ops run on its GPUs: our kernels where they are proven, torch's products elsewhere.

Until then a door stands before every op on CUDA tensors: the first call settles, that is, loads the library, whose
kernels take the doors' places, and registers torch's products over those that are not proven. Afterwards a call runs no
Python of ours, but where torch's products take the place of an op. The doors stay below: a thread may stand in one.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .. import library
from ..declare import DECLARED
from . import machine, proof
from .fallback import FALLBACKS
from .families import DTYPES
from .machine import Facts, Gpu
from .records import Record, Verdict
from .timing import is_right, ranking

logger = logging.getLogger("smoothquant_ext")


class Settled(NamedTuple):
    """How the ops of a process run on its GPUs."""

    facts: Facts
    records: tuple[Record, ...]
    """Of each kind of GPU; none where our kernels cannot run at all."""
    replaced: dict[str, str]
    """The ops that torch computes, and why."""


class _State:
    """What the process has registered; a value, so that a test can have its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.library_error = ""
        self.registered: list[torch.library.Library] = []
        self.settled: Settled | None = None
        self.warm: set[int] = set()


_state = _State()
os.register_at_fork(after_in_child=lambda: setattr(_state, "lock", threading.RLock()))


def start() -> None:
    """Puts a door before each op on CUDA tensors, where torch has CUDA."""
    if torch.version.cuda is None:
        return
    doors = {name: _door(name) for name in DECLARED if name in FALLBACKS or DECLARED[name].cuda}
    _register(doors)
    # Torch warns, once in a process, of a kernel that takes another's place: this is that time.
    _register(dict([next(iter(doors.items()))]))


def _register(functions: Mapping[str, Callable[..., Any]]) -> None:
    registered = torch.library.Library("sq", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in functions.items():
            registered.impl(name, function, "CUDA", allow_override=True)
    _state.registered.append(registered)


def _door(name: str) -> Callable[..., Any]:
    def through(*args: Any, **kwargs: Any) -> Any:
        settle()
        return getattr(torch.ops.sq, name).default(*args, **kwargs)

    return through


def library_error() -> str:
    """Why the library could not be loaded; empty before that was tried."""
    return _state.library_error


def settled() -> Settled | None:
    """How the ops run on GPUs, or ``None`` before the first use of one."""
    return _state.settled


def settle(device: int | None = None) -> Settled:
    """Settles how the ops run on the GPUs of this process; proves the kernels if nobody has on such a GPU.

    Called when an 8-bit layer moves to a GPU, or the first op runs there.

    Args:
        device: the index of the GPU that is going to be used: what is made once a GPU is made now.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which no kernel can be proven.
    """
    with _state.lock:
        if _state.settled is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "smoothquant_ext: the first 8-bit op on a GPU is inside a CUDA graph; run one before the capture"
                )
            _settle()
        assert _state.settled is not None
        index = torch.cuda.current_device() if device is None else device
        if _state.settled.records and index not in _state.warm:
            torch.ops.sq._cuda_warm_up(index)
            _state.warm.add(index)
        return _state.settled


def _settle() -> None:
    facts = machine.gather()
    why = machine.why_no_gpu(facts) or machine.why_no_kernels(facts)
    found: tuple[Record, ...] = ()
    if not why:
        kinds = dict.fromkeys(facts.gpus)
        found = tuple(proof.proven(gpu, facts.gpus.index(gpu), facts.archs, logger.warning) for gpu in kinds)
        why = _load()  # only now: with it, its kernels run
    if not why:
        for dtype in DTYPES:
            torch.ops.sq._set_cuda_ways(dtype, ranking(found, dtype))
    replaced = {name: reason for name in DECLARED if name in FALLBACKS and (reason := why or why_replaced(name, found))}
    _use(Settled(facts, () if why else found, replaced))
    if why or (failed := refused(found)):
        logger.warning(why_torch(facts, why) if why else why_refused(failed))


def _load() -> str:
    """Loads our kernels; why it cannot, or nothing."""
    try:
        library.load(library.CUDA)
    except ImportError as error:
        _state.library_error = str(error)
    return _state.library_error


def _use(settled: Settled) -> None:
    functions = {name: FALLBACKS[name] for name in settled.replaced}
    _register(functions | {"_gemm_by_torch": _gemm_by_torch})
    _state.settled = settled


def _gemm_by_torch(*args: Any) -> torch.Tensor:
    """The way "torch"; tells what went wrong, since errors lose their text on the way through C++."""
    try:
        product: torch.Tensor = FALLBACKS["_gemm_by_torch"](*args)
    except Exception as error:
        logger.error("w8a8_gemm by torch: %s", error)
        raise
    return product


def trust_all() -> None:
    """Lets every kernel run, proven or not: for the process that proves them.

    Raises:
        ImportError: they cannot be loaded.
    """
    with _state.lock:
        if why := _load():
            raise ImportError(why)
        replaced = {name: "it has no kernel" for name in FALLBACKS if name in DECLARED and not DECLARED[name].cuda}
        _use(Settled(machine.gather(), (), replaced))


def why_replaced(op: str, found: tuple[Record, ...]) -> str:
    """Why torch computes an op where our kernels could run; empty if they do. Products have their ranking instead."""
    declaration = DECLARED[op]
    if not declaration.cuda:
        return declaration.why_not_cuda
    missing = [family for family in declaration.cuda if family != "gemm" and not is_right(found, family)]
    return f"{' and '.join(missing)} failed the proof" if missing else ""


def refused(found: tuple[Record, ...]) -> dict[str, Verdict]:
    """The families that are not right, with what was seen."""
    return {
        family: verdict
        for record in found
        for family, verdict in record.verdicts.items()
        if not verdict.is_right and not family.startswith("library_fast")  # which may be less exact than is right
    }


def why_torch(facts: Facts, why: str) -> str:
    """The sentence of a GPU without our kernels."""
    names = ", ".join(dict.fromkeys(gpu.name for gpu in facts.gpus)) or "a GPU"
    return f"8-bit ops on {names} are computed by torch, more slowly than by our kernels: {why}"


def why_refused(failed: dict[str, Verdict]) -> str:
    """The sentence of kernels that failed."""
    kinds = ", ".join(f"{family} ({verdict.kind})" for family, verdict in failed.items())
    return f"some CUDA kernels failed their proof here and are not used: {kinds}; 'smoothquant info' says more"


def kinds(facts: Facts) -> dict[Gpu, Record | None]:
    """Each kind of GPU with its record, or ``None`` before its proof."""
    used = {Gpu(*record.key[:2]): record for record in _state.settled.records} if _state.settled else {}
    return {gpu: used.get(gpu) or proof.known(gpu) for gpu in dict.fromkeys(facts.gpus)}
