"""Proves the CUDA kernels on a GPU: runs each family in a process of its own and judges what came of it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import site
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import library
from . import records
from .families import DTYPES, families_of
from .machine import Gpu, driver_release
from .records import COULD_NOT_RUN, HUNG, RIGHT, WRONG, Key, Record, Timing, Verdict
from .timing import is_right

LIMIT = 90.0
"""Seconds for a family: torch's start, the context, the cases."""
TIMING_LIMIT = 180.0
AT_A_TIME = 4
"""Processes; each takes about 0.5 GB of the GPU and, while torch starts, a core."""
CHILD = ("-m", "smoothquant_ext.ops.cuda.child")
"""What the interpreter is told to run."""

Report = Callable[[str, Verdict], None]
"""Told each family with its verdict as it is judged."""


def key_of(gpu: Gpu) -> Key:
    """What a proof on this GPU depends on."""
    digest = hashlib.sha256(library.CUDA.read_bytes()).hexdigest() if library.CUDA.is_file() else ""
    return Key(gpu.name, gpu.arch, driver_release(), torch.__version__, cublaslt_version(), digest)


def cublaslt_version() -> str:
    """The version of the cuBLASLt that torch has loaded, such as "130100"; empty if it has none."""
    try:
        torch_cuda = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        function = torch_cuda.cublasLtGetVersion  # of torch's own dependencies, whatever their names
    except (OSError, AttributeError):
        return ""
    function.restype = ctypes.c_size_t
    return str(function())


def prove(gpu: Gpu, index: int, archs: str, report: Report = lambda _family, _verdict: None) -> Record:
    """Proves and times every family of kernels on the GPU of this index, each in a process of its own.

    Args:
        gpu: the GPU.
        index: its index in torch.
        archs: the architectures that the library has code for.
        report: called with each family and its verdict, from other threads.
    """
    device = f"cuda:{index}"

    def judge(family: str) -> Verdict:
        verdict = verdict_of(run_child([family, device], LIMIT))
        report(family, verdict)
        return verdict

    families = families_of(gpu.arch, archs)
    with ThreadPoolExecutor(min(AT_A_TIME, os.cpu_count() or 1)) as pool:
        verdicts = dict(zip(families, pool.map(judge, families), strict=True))
    today = datetime.now(timezone.utc).date().isoformat()
    record = Record(key_of(gpu), today, verdicts, ())
    return record._replace(timings=time_right_ways(record, device))


def time_right_ways(record: Record, device: str) -> tuple[Timing, ...]:
    """The times of the proven ways to multiply and of torch's; those that there are if the process fails."""
    ways = [family for family in record.verdicts if is_right([record], family)]
    ended = run_child(["time", ",".join([*ways, *(f"torch_{dtype}" for dtype in DTYPES)]), device], TIMING_LIMIT)
    return tuple(Timing(*line["timing"]) for line in ended.lines if "timing" in line)


# --- the child ------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a process ended."""

    lines: list[dict[str, Any]]
    """What it said."""
    status: int | None
    """Its exit status; ``None`` if it was killed when its time was over."""
    errors: str
    """What it wrote to stderr."""


def run_child(arguments: Sequence[str], limit: float) -> Ended:
    """Runs the child in a session of its own, and kills all of it when its time is over."""
    if not sys.executable:
        return Ended([], 1, "Python does not know its own interpreter (sys.executable is empty)")
    try:
        process = subprocess.Popen(
            [sys.executable, *CHILD, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=child_environment(),
        )
    except OSError as error:
        return Ended([], 1, str(error))
    status: int | None
    try:
        said, errors = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        kill_group(process)
        said, errors = process.communicate()
        status = None
    except BaseException:  # Ctrl-C: nothing stays behind
        kill_group(process)
        process.wait()
        raise
    return Ended(parsed(said.decode(errors="replace")), status, errors.decode(errors="replace").strip())


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def child_environment() -> dict[str, str]:
    """This process's, so that the child finds the same package and GPUs, but no module of the current folder."""
    package, installed = str(Path(__file__).parents[3]), [*site.getsitepackages(), site.getusersitepackages()]
    # Where packages are installed stays where it is in the search: its modules must not come before Python's own.
    first = [] if package in installed else [package]
    path = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    environment.pop("SMOOTHQUANT_CUDA_GEMM", None)
    return environment


def parsed(said: str) -> list[dict[str, Any]]:
    """The lines of the protocol; the last may be cut off, and others may be something else's."""
    lines = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict):
                lines.append(values)
    return lines


def verdict_of(ended: Ended) -> Verdict:
    """What a process that proved a family has shown."""
    last = ended.lines[-1] if ended.lines else {}
    if "wrong" in last:
        return Verdict(WRONG, last["wrong"])
    if "could_not_run" in last:
        return Verdict(COULD_NOT_RUN, last["could_not_run"])
    if ended.status is None:
        # Without a case it has not reached the kernels: a slow disk, a busy machine.
        return Verdict(HUNG, last["case"]) if "case" in last else Verdict(COULD_NOT_RUN, "torch took too long to start")
    if ended.status == 0 and "right" in last:
        return Verdict(RIGHT)
    reason = ended.errors.rpartition("\n")[2] or "it said nothing"
    if "case" in last:
        how = f"signal {-ended.status}" if ended.status < 0 else reason
        return Verdict(WRONG, f"{last['case']}: the process died: {how}")
    return Verdict(COULD_NOT_RUN, reason)


# --- records --------------------------------------------------------------------------------------------------------


def known(gpu: Gpu) -> Record | None:
    """The record of this GPU, shipped or kept from an earlier proof."""
    return records.find(key_of(gpu), records.cache_folder(), records.read_shipped())


def proven(
    gpu: Gpu,
    index: int,
    archs: str,
    announce: Callable[[str], None],
    report: Report = lambda _family, _verdict: None,
    again: bool = False,
) -> Record:
    """The record of this GPU; proves it if there is none, while other processes that want the same wait.

    Args:
        gpu, index, archs, report: see ``prove``.
        announce: told what takes time, in a sentence.
        again: prove it even if there is a record.
    """
    if not again and (record := known(gpu)) is not None:
        return record
    key, folder = key_of(gpu), records.cache_folder()
    with records.one_at_a_time(key, folder, lambda: announce(f"another process proves the kernels on {gpu.name}")):
        if not again and (record := known(gpu)) is not None:
            return record
        announce(f"proving and timing the CUDA kernels on {gpu.name}, once")
        record = prove(gpu, index, archs, report)
        records.store(record, folder)
        return record
