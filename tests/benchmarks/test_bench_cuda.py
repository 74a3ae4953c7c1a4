"""The benchmarks of the CUDA ops as far as they need no GPU: cases, targets, summaries, what the script refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bench_cuda
import cuda_cases
import pytest
import torch
from cuda_cases import Gemm, Record, summary, verdicts

ROOT = Path(__file__).parents[2]

SCRIPT = ROOT / "benchmarks" / "gpu_acceptance.sh"


def test_every_layer_is_measured_with_every_number_of_tokens() -> None:
    cases = list(cuda_cases.gemms())
    assert len(cases) == len(set(cases)) == 4 * 14
    assert {case.m for case in cases} == {2**i for i in range(14)}
    assert Gemm("down", 8192, 4096, 14336) in cases
    assert cases[0].m == 1


@pytest.mark.parametrize(("case_bytes", "sets"), [(1, 64), (10 * 2**20, 11), (50 * 2**20, 3), (2**30, 2), (0, 64)])
def test_buffers_take_turns_past_the_cache(case_bytes: int, sets: int) -> None:
    assert cuda_cases.copies(case_bytes, 50 * 2**20) == sets


def product(what: str, m: int, microseconds: float, n: int = 14336, k: int = 4096) -> Record:
    return {"what": what, "m": m, "n": n, "k": k, "microseconds": microseconds, "bytes": 1}


COPY = {"what": "copy", "microseconds": 100.0, "bytes": 400_000_000}  # 4 TB/s


def test_targets_take_the_worst_shape() -> None:
    records = [
        COPY,
        *(product(f"int8_{family}", 4096, time) for family, time in (("mma", 250.0), ("wgmma", 160.0))),
        *(product("int8", m, time) for m, time in ((1, 16.0), (2048, 100.0), (4096, 200.0))),
        *(product("bf16", m, time) for m, time in ((1, 10.0), (2048, 160.0), (4096, 280.0))),
        {"what": "rms_norm", "rows": 4096, "k": 4096, "microseconds": 20.0, "bytes": 72_000_000},
    ]
    found = {verdict.target.name: verdict for verdict in verdicts(records)}
    speedup = found["INT8 over torch bf16, M >= 2048"]
    assert speedup.worst == pytest.approx(1.4)
    assert speedup.where == "M=4096 N=14336 K=4096"
    assert speedup.text.startswith("  MISS")
    producers = found["producers, 4096 rows, of copy bandwidth"]
    assert producers.worst == pytest.approx(0.9)
    assert producers.text.startswith("  ok")
    single = found["INT8, M = 1, weights over 50 MiB, of copy bandwidth"]
    assert single.worst == pytest.approx(14336 * 4096 / 16.0 / 4e6)
    own = found["INT8 on our own kernels over the library, M >= 2048"]
    assert own.worst == pytest.approx(200.0 / 160.0)
    assert own.where == "M=4096 N=14336 K=4096"
    assert found["FP8 over torch bf16, M >= 2048"].text.endswith("not measured")


def write_lines(path: Path, *records: Record) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step(name: str, result: str = "passed") -> Record:
    return {"name": name, "result": result, "seconds": 3}


@pytest.mark.parametrize(
    ("steps", "last", "passed"),
    [
        ([step("tests"), step("benchmarks")], "PASSED", True),
        ([step("tests", "FAILED"), step("benchmarks")], "FAILED: tests", False),
        ([step("tests", "cut off"), step("benchmarks")], "CUT OFF: tests", False),
        ([step("tests")], "CUT OFF: what is not listed above did not run", False),
        ([], "CUT OFF: what is not listed above did not run", False),
    ],
)
def test_the_summary_says_what_passed(tmp_path: Path, steps: list[Record], last: str, passed: bool) -> None:
    write_lines(tmp_path / "steps.jsonl", *steps)
    write_lines(tmp_path / "bench.jsonl", COPY, product("int8", 2048, 100.0))
    with (tmp_path / "bench.jsonl").open("a") as file:
        file.write('{"what": "int8", "m": 40')  # cut off
    lines, result = summary(tmp_path)
    assert (lines[-1], result) == (last, passed)
    assert any("2048  14336   4096     2405.2" in line for line in lines)
    assert any("copy: 4000 GB/s" in line for line in lines)
    process = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "cuda_cases.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert process.returncode == (0 if passed else 1)
    assert process.stdout.splitlines() == lines


def test_every_call_of_the_benchmark_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where nothing is timed."""
    monkeypatch.setattr(bench_cuda, "DEVICE", "cpu")
    for name in cuda_cases.PRODUCERS:
        bench_cuda.producer_call(name, 3, 64)()
    case = Gemm("small", 17, 32, 64)
    engines = {**bench_cuda.ENGINES, **bench_cuda.OWN_ENGINES}
    for name in engines:
        if name != "scaled_mm":
            assert engines[name](case)().shape == (17, 32)
    assert "SMOOTHQUANT_CUDA_GEMM" not in os.environ


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_accepted(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("gpu_acceptance: ")
    assert "built without CUDA" in process.stderr or "sees no GPU" in process.stderr
    assert subprocess.run([SCRIPT], capture_output=True, check=False).returncode == 2
