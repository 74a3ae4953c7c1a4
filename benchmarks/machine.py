"""Describes a benchmark's machine, its measured limits, the versions and the commit."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from smoothquant_ext import ops

HERE = Path(__file__).parent


def cpu_name() -> str:
    """The processor's name, from the operating system."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache_bytes() -> int:
    """The size of the largest cache of this process's CPU; 0 if Linux does not report it."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=0)


def describe(*packages: str) -> dict[str, Any]:
    """Machine, its load, threads, kernels, commit, and the versions of torch and of the packages that are installed."""
    installed = {distribution.name: distribution.version for distribution in distributions()}
    versions = {name: installed[name] for name in ("torch", "transformers", *packages) if name in installed}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": ops.cpu_isa(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),  # processes that ran in the minute before
    }


def peaks(threads: int) -> dict[str, float]:
    """Measures this machine's limits: int8_gops, bf16_gflops (where it has such instructions), dram_gbytes_per_s."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peaks"
        subprocess.run(
            [
                os.environ.get("CXX", "c++"),
                "-O3",
                "-std=c++17",
                "-mavx2",
                "-pthread",
                HERE / "peaks.cpp",
                "-o",
                program,
            ],
            check=True,
        )
        output = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(output)
    return measured


def mean_limits(*measured: dict[str, float]) -> dict[str, float]:
    """The mean of the limits before and after a run, since a shared machine's limits change."""
    return {name: statistics.fmean(limits[name] for limits in measured) for name in measured[0]}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Writes raw results as JSON, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
