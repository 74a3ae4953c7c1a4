"""The cases, target speeds and summary of benchmarks/gpu_acceptance.sh. Needs no GPU and no torch.

python benchmarks/cuda_cases.py OUT_DIR     prints the summary of the results there; exit status 1 if a step failed
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# The linear layers of Llama-3-8B, [N, K].
LINEARS = {"q/o": (4096, 4096), "k/v": (1024, 4096), "gate/up": (14336, 4096), "down": (4096, 14336)}
# The most telling first: a run may be cut off.
TOKENS = (1, 4096, 2048, 8, 16, 128, 8192, 4, 64, 512, 1024, 2, 32, 256)
LARGE = 2048
LAST_STEP = "benchmarks"
PRODUCER_ROWS, PRODUCER_COLUMNS = 4096, (4096, 14336)
MIB = 2**20

Record = dict[str, Any]


class Gemm(NamedTuple):
    """One product, y [m, n] of a [m, k] and b [n, k]."""

    layer: str
    m: int
    n: int
    k: int

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Bytes of the 8-bit weight."""
        return self.n * self.k


def gemms() -> Iterator[Gemm]:
    """Every product, the most important first."""
    for m in TOKENS:
        for layer, (n, k) in LINEARS.items():
            yield Gemm(layer, m, n, k)


# Bytes moved an element, by 16-bit inputs and 8-bit results.
PRODUCERS: dict[str, int] = {
    "quantize_per_token": 3,
    "quantize_static": 3,
    "rms_norm_quantize": 3,
    "rms_norm_quantize, residual": 7,
    "layer_norm_quantize, residual": 7,
    "silu_mul_quantize": 5,
    "gelu_mul_quantize": 5,
    "gelu_quantize": 3,
    "relu_quantize": 3,
    "rms_norm": 4,
}


def copies(case_bytes: int, cache_bytes: int, most: int = 64) -> int:
    """The number of sets of buffers that take turns, so that each has left the cache at its next turn."""
    return max(2, min(most, 2 * cache_bytes // max(1, case_bytes) + 1))


# --- targets --------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A target speed: the worst of its ratios must reach ``least``."""

    name: str
    least: float
    ratios: Callable[[Sequence[Record]], dict[str, float]]


class Verdict(NamedTuple):
    """Whether the results reach a target; unknown without a ratio."""

    target: Target
    worst: float | None
    where: str

    @property
    def text(self) -> str:
        if self.worst is None:
            return f"  ?    {self.target.name}: not measured"
        mark = "ok  " if self.worst >= self.target.least else "MISS"
        return f"  {mark} {self.target.name}: {self.worst:.2f} at worst ({self.where}), wanted {self.target.least}"


def _times(records: Sequence[Record], what: str) -> dict[tuple[int, int, int], float]:
    return {(r["m"], r["n"], r["k"]): r["microseconds"] for r in records if r["what"] == what and "m" in r}


def _speedup(ours: str, peer: str, least_m: int) -> Callable[[Sequence[Record]], dict[str, float]]:
    def ratios(records: Sequence[Record]) -> dict[str, float]:
        mine, other = _times(records, ours), _times(records, peer)
        shapes = [shape for shape in mine if shape in other and shape[0] >= least_m]
        return {"M={} N={} K={}".format(*shape): other[shape] / mine[shape] for shape in shapes}

    return ratios


def _own_speedup(dtype: str) -> Callable[[Sequence[Record]], dict[str, float]]:
    """The speed-up of the faster tensor-core product of this package over the default."""

    def ratios(records: Sequence[Record]) -> dict[str, float]:
        each = [_speedup(f"{dtype}_{family}", dtype, LARGE)(records) for family in ("mma", "wgmma")]
        return {shape: max(one.get(shape, 0.0) for one in each) for shape in {**each[0], **each[1]}}

    return ratios


def _copy_gbytes(records: Sequence[Record]) -> float:
    measured = [r["bytes"] / r["microseconds"] for r in records if r["what"] == "copy"]
    return statistics.median(measured) if measured else 0.0


def _producer_bandwidth(records: Sequence[Record]) -> dict[str, float]:
    limit = _copy_gbytes(records)
    found = [r for r in records if r["what"] in PRODUCERS]
    return {f"{r['what']} K={r['k']}": r["bytes"] / r["microseconds"] / limit for r in found} if limit else {}


def _single_row_bandwidth(what: str) -> Callable[[Sequence[Record]], dict[str, float]]:
    def ratios(records: Sequence[Record]) -> dict[str, float]:
        limit = _copy_gbytes(records)
        times = {shape: time for shape, time in _times(records, what).items() if shape[0] == 1}
        large = {(n, k): time for (_, n, k), time in times.items() if n * k > 50 * MIB}
        return {f"N={n} K={k}": n * k / time / limit for (n, k), time in large.items()} if limit else {}

    return ratios


TARGETS = (
    Target("INT8 over torch bf16, M >= 2048", 1.5, _speedup("int8", "bf16", LARGE)),
    Target("FP8 over torch bf16, M >= 2048", 1.6, _speedup("fp8", "bf16", LARGE)),
    Target("FP8 over torch._scaled_mm by rows, M >= 2048", 0.97, _speedup("fp8", "scaled_mm", LARGE)),
    Target("INT8 on our own kernels over the library, M >= 2048", 1.0, _own_speedup("int8")),
    Target("FP8 on our own kernels over the library, M >= 2048", 1.0, _own_speedup("fp8")),
    Target("producers, 4096 rows, of copy bandwidth", 0.85, _producer_bandwidth),
    Target("INT8, M = 1, weights over 50 MiB, of copy bandwidth", 0.75, _single_row_bandwidth("int8")),
    Target("FP8, M = 1, weights over 50 MiB, of copy bandwidth", 0.75, _single_row_bandwidth("fp8")),
)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """A verdict for each target."""
    results = []
    for target in TARGETS:
        ratios = target.ratios(records)
        where = min(ratios, key=ratios.__getitem__) if ratios else ""
        results.append(Verdict(target, ratios.get(where), where))
    return results


# --- what was found -------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[Record]:
    """The records of a file of JSON lines; the last may be cut off."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def speed_table(records: Sequence[Record]) -> list[str]:
    """A table of the measured products in TOPS, then of the producers in GB/s."""
    engines: tuple[str, ...] = ("int8", "linear", "int_mm", "fp8", "scaled_mm", "bf16")
    engines += tuple(f"{dtype}_{family}" for dtype in ("int8", "fp8") for family in ("mma", "wgmma"))
    by_engine = {engine: _times(records, engine) for engine in engines}
    shapes = sorted({shape for times in by_engine.values() for shape in times}, key=lambda s: (s[1], s[2], s[0]))
    lines = (
        [f"  {'M':>5} {'N':>6} {'K':>6}" + "".join(f"{engine:>11}" for engine in engines) + "   TOPS"] if shapes else []
    )
    for m, n, k in shapes:
        times = [by_engine[engine].get((m, n, k)) for engine in engines]
        cells = [f"{2e-6 * m * n * k / time:11.1f}" if time else f"{'-':>11}" for time in times]
        lines.append(f"  {m:5} {n:6} {k:6}" + "".join(cells))
    if limit := _copy_gbytes(records):
        lines.append(f"  copy: {limit / 1e3:.0f} GB/s")
        for name, share in _producer_bandwidth(records).items():
            lines.append(f"  {name:40} {share:5.0%} of it")
    return lines


def summary(folder: Path) -> tuple[list[str], bool]:
    """The last lines of an acceptance run; whether all steps passed."""
    steps = read_lines(folder / "steps.jsonl")
    records = read_lines(folder / "bench.jsonl")
    lines = ["Steps"]
    lines += [f"  {step['result']:8} {step['name']} ({step['seconds']} s)" for step in steps] or ["  none was finished"]
    lines += ["Speed", *speed_table(records)]
    lines += ["Targets", *(verdict.text for verdict in verdicts(records))]
    failed = [step["name"] for step in steps if step["result"] == "FAILED"]
    unfinished = [step["name"] for step in steps if step["result"] not in ("passed", "FAILED")]
    if failed:
        lines.append(f"FAILED: {', '.join(failed)}")
    elif unfinished:
        lines.append(f"CUT OFF: {', '.join(unfinished)}")
    elif not steps or steps[-1]["name"] != LAST_STEP:
        lines.append("CUT OFF: what is not listed above did not run")
    else:
        lines.append("PASSED")
    return lines, lines[-1] == "PASSED"


def main() -> int:
    """Prints the summary of the folder on the command line."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    lines, passed = summary(Path(sys.argv[1]))
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
