"""The proof of a family in a process of its own: each verdict is provoked, on the emulated device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from emulated_cuda import NAME, emulated_cuda
from emulation import ROOT

from smoothquant_ext.ops.cuda import proof, records
from smoothquant_ext.ops.cuda.machine import Gpu
from smoothquant_ext.ops.cuda.proof import Ended, run_child, verdict_of
from smoothquant_ext.ops.cuda.records import COULD_NOT_RUN, HUNG, RIGHT, WRONG, Record, Verdict

CHILD = ROOT / "tests" / "support" / "emulated_child.py"
GPU = Gpu(NAME, 90)

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(autouse=True)
def _child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Children run on the emulated device, and compute few cases; records are kept in a folder of the test."""
    monkeypatch.setattr(proof, "CHILD", (str(CHILD),))
    monkeypatch.setenv("PYTHONPATH", str(CHILD.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SQ_EMULATED_CASES", "3")
    with emulated_cuda(settled=False):
        yield


def judged(family: str, limit: float = 100) -> Verdict:
    return verdict_of(run_child([family, "cuda:0"], limit))


@pytest.mark.parametrize("family", ["quantize", "skinny_int8"])
def test_right(family: str) -> None:
    assert judged(family) == (RIGHT, "")


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        (
            "wrong",
            WRONG,
            "quantize_per_token(x=float32[1, 577], dtype=int8): 1 of 577 elements are wrong, the first at",
        ),
        ("crashes", WRONG, "quantize_per_token(x=float32[1, 577], dtype=int8): the process died: signal 11"),
        ("poisons", WRONG, "quantize_per_token(x=float32[1, 577], dtype=int8): CUDA error: an illegal memory access"),
        ("lacks_memory", COULD_NOT_RUN, "no memory: CUDA out of memory. Tried to allocate 20.00 MiB"),
        ("lacks_memory_elsewhere", COULD_NOT_RUN, "no memory: w8a8_gemm: cuBLASLt: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_faults(fault: str, kind: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQ_EMULATED_FAULT", f"{fault} quantize")
    verdict = judged("quantize")
    assert verdict.kind == kind
    assert verdict.detail.startswith(detail)
    assert "advice" not in verdict.detail


def test_a_hang_names_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQ_EMULATED_FAULT", "hangs quantize")
    assert judged("quantize", limit=40) == (HUNG, "quantize_per_token(x=float32[1, 577], dtype=int8)")


def test_a_slow_start_is_no_hang() -> None:
    assert judged("quantize", limit=0.2) == (COULD_NOT_RUN, "torch took too long to start")


def test_what_a_process_started_is_killed_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = tmp_path / "alive"
    grandchild = f"import time\nwhile True: open({str(alive)!r}, 'w').close(); time.sleep(0.05)"
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {grandchild!r}])"
    monkeypatch.setattr(proof, "CHILD", ("-c", script))
    assert run_child([], limit=2).status is None
    assert alive.exists()
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


def test_without_an_interpreter_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert judged("quantize").kind == COULD_NOT_RUN
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "No such file" in judged("quantize").detail


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        (Ended([], 1, "Traceback\nImportError: no torch"), (COULD_NOT_RUN, "ImportError: no torch")),
        (Ended([], 0, ""), (COULD_NOT_RUN, "it said nothing")),
        (Ended([{"case": "c"}], 0, ""), (WRONG, "c: the process died: it said nothing")),
        (Ended([{"case": "c"}, {"right": 1}], 1, "bad exit"), (COULD_NOT_RUN, "bad exit")),
        (Ended([{"case": "c"}, {"right": 0}], 0, ""), (RIGHT, "")),
    ],
)
def test_verdicts(ended: Ended, verdict: tuple[str, str]) -> None:
    assert verdict_of(ended) == verdict


def test_the_protocol_survives_other_lines() -> None:
    assert proof.parsed('hello\n{"case": "c"}\n[1]\n{"right": 1}\n{"cas') == [{"case": "c"}, {"right": 1}]


def test_the_child_runs_with_nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", "mma")
    environment = proof.child_environment()
    assert "SMOOTHQUANT_CUDA_GEMM" not in environment
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path(proof.__file__).parents[3])


def test_an_installed_package_does_not_come_before_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setattr(proof.site, "getsitepackages", lambda: [str(Path(proof.__file__).parents[3])])
    assert proof.child_environment()["PYTHONPATH"] == ""


def test_a_gpu_that_another_process_has_for_itself_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "print('hello'); raise RuntimeError('CUDA error: CUDA-capable device(s) is/are busy or unavailable')"
    monkeypatch.setattr(proof, "CHILD", ("-c", script))
    assert judged("quantize") == (COULD_NOT_RUN, script.partition("raise ")[2].replace("('", ": ").replace("')", ""))


def test_the_version_of_cublaslt_is_that_of_the_copy_in_use() -> None:
    assert proof.cublaslt_version() == ""  # torch for the CPU has loaded none


# --- a whole proof ----------------------------------------------------------------------------------------------------


def test_a_proof_is_made_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "families_of", lambda _arch, _archs: ("quantize", "skinny_int8"))
    said: list[str] = []
    seen: dict[str, Verdict] = {}
    record = proof.proven(GPU, 0, "80 90a", said.append, seen.__setitem__)
    assert record.verdicts == seen == {"quantize": Verdict(RIGHT), "skinny_int8": Verdict(RIGHT)}
    assert {(timing.dtype, timing.way) for timing in record.timings} == {
        ("int8", "skinny"),
        ("int8", "torch"),
        ("fp8", "torch"),
    }
    assert said == [f"proving and timing the CUDA kernels on {NAME}, once"]
    assert proof.known(GPU) == record
    monkeypatch.setattr(proof, "prove", lambda *_: pytest.fail("it is proven already"))
    assert proof.proven(GPU, 0, "80 90a", pytest.fail) == record


def test_another_library_is_proven_again(tmp_path: Path) -> None:
    record = Record(proof.key_of(GPU), "2026-12-01", {}, ())
    records.store(record, records.cache_folder())
    assert proof.known(GPU) == record
    assert proof.proven(GPU, 0, "", pytest.fail) == record
    other = tmp_path / "_C_cuda.so"
    other.write_bytes(b"another build")
    with patch.object(proof.library, "CUDA", other):
        assert proof.known(GPU) is None


def test_times_survive_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"timing": ["int8", "torch", 1, 8, 16, 2.5]}
    monkeypatch.setattr(proof, "run_child", lambda *_: Ended([line, {"case": "?"}], -9, ""))
    record = Record(proof.key_of(GPU), "", {}, ())
    assert [timing.microseconds for timing in proof.time_right_ways(record, "cuda:0")] == [2.5]
