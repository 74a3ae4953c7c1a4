"""Whether CUDA kernels can run here and why not, each way simulated; what info says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import NAME, emulated_cuda, unsettled

import smoothquant_ext
from smoothquant_ext import ops
from smoothquant_ext.ops import library
from smoothquant_ext.ops.cuda import machine, proof, records, settle, status
from smoothquant_ext.ops.cuda.families import families_of
from smoothquant_ext.ops.cuda.machine import Facts, Gpu, has_code_for, why_no_gpu, why_no_kernels
from smoothquant_ext.ops.cuda.records import Record, Timing, Verdict
from smoothquant_ext.ops.declare import DECLARED
from smoothquant_ext.ops.library import Built

H100, B200, T4 = Gpu("NVIDIA H100", 90), Gpu("NVIDIA B200", 100), Gpu("Tesla T4", 75)
RELEASE = "80+PTX 89 90a 100a 120"
GOOD = Facts("13.0", "", 13000, (H100,), RELEASE)


@pytest.mark.parametrize(
    ("facts", "no_gpu", "no_kernels"),
    [
        (GOOD, "", ""),
        (GOOD._replace(torch_cuda=None), "this torch is built without CUDA", ""),
        (GOOD._replace(library_error="_C_cuda.so is missing"), "", "_C_cuda.so is missing"),
        (GOOD._replace(driver=0), "there is no NVIDIA driver", ""),
        (GOOD._replace(driver=12040), "the NVIDIA driver is for CUDA 12.4, and torch needs 13.0: update it", ""),
        (GOOD._replace(gpus=()), "the driver shows no GPU (is CUDA_VISIBLE_DEVICES set?)", ""),
        (
            GOOD._replace(gpus=(H100, T4)),
            "",
            "Tesla T4 has compute capability 7.5, and the kernels are built for 80+PTX 89 90a 100a 120",
        ),
        (
            GOOD._replace(gpus=(B200,), archs="80 90a"),
            "",
            "NVIDIA B200 has compute capability 10.0, and the kernels are built for 80 90a",
        ),
        (GOOD._replace(archs=""), "", ""),  # nothing is known of the library: the proof will show
        (GOOD._replace(nvcc="13.2"), "", ""),
        (
            GOOD._replace(torch_cuda="12.8", driver=12080, nvcc="13.0"),
            "",
            (
                "the NVIDIA driver is for CUDA 12.8, and the kernels were compiled by nvcc 13.0: update the driver, or "
                "compile with an older nvcc"
            ),
        ),
    ],
)
def test_every_reason_is_a_sentence(facts: Facts, no_gpu: str, no_kernels: str) -> None:
    assert (why_no_gpu(facts), why_no_kernels(facts)) == (no_gpu, no_kernels)


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("80", [80, 86, 89], [75, 90, 120]),
        ("86", [86, 89], [80, 90]),
        ("90a", [90], [80, 100]),
        ("80+PTX", [80, 90, 121], [75]),
        ("100f", [100, 103], [90, 110, 120]),
        (RELEASE, [80, 86, 89, 90, 100, 103, 120, 121], [75]),
    ],
)
def test_code_runs_on(archs: str, runs: list[int], does_not: list[int]) -> None:
    assert all(has_code_for(archs, arch) for arch in runs)
    assert not any(has_code_for(archs, arch) for arch in does_not)


class Driver:
    """What ctypes loads in the place of libcuda."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return self.status


def test_the_driver_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, version in ((0, 12040), (1, 0)):
        monkeypatch.setattr(machine.ctypes, "CDLL", lambda _, code=code: Driver(code))
        assert machine.driver_version() == version
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError()))
    assert machine.driver_version() == 0


def test_the_driver_says_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12"
    monkeypatch.setattr(Path, "read_text", lambda _: said)
    assert machine.driver_release() == "580.65.06"
    monkeypatch.setattr(Path, "read_text", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    assert machine.driver_release() == ""


@pytest.mark.parametrize(
    ("record", "has_library", "expected"),
    [
        ('{"archs": "80", "nvcc": "13.0", "sentence": "CUDA kernels for 80."}', True, Built("80", "13.0", "")),
        (
            '{"archs": "", "nvcc": "", "sentence": "built without: no nvcc."}',
            False,
            Built("", "", "built without: no nvcc."),
        ),
        ("{", True, Built("", "", "")),
        ("[]", False, None),
        (None, False, None),
    ],
)
def test_the_build_says_what_it_made(
    record: str | None, has_library: bool, expected: Built | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "BUILT", tmp_path / "_build.json")
    monkeypatch.setattr(library, "CUDA", tmp_path / "_C_cuda.so")
    if record is not None:
        library.BUILT.write_text(record)
    if has_library:
        library.CUDA.touch()
    missing = "smoothquant_ext is not compiled: _C_cuda.so is missing; run 'pip install .' in its source folder"
    assert library.built() == (expected or Built("", "", missing))


def test_declarations_name_the_ops_that_have_cuda_kernels() -> None:
    root = Path(smoothquant_ext.__file__).parents[1]
    paths = [*(root / "csrc" / "cuda" / "ops").glob("*.cpp"), *(root / "csrc" / "common").glob("*_ops.h")]
    sources = "".join(path.read_text() for path in paths)
    implemented = set(re.findall(r'm\.impl\("([a-z]\w+)"', sources))
    assert {name for name, declaration in DECLARED.items() if declaration.cuda} == implemented
    assert all(bool(declaration.cuda) != bool(declaration.why_not_cuda) for declaration in DECLARED.values())
    known = {"gemm", *families_of(90, RELEASE)}
    assert {family for declaration in DECLARED.values() for family in declaration.cuda} <= known


# --- info -----------------------------------------------------------------------------------------------------------


def rows_of_info() -> dict[str, ops.OpInfo]:
    return {row.op: row for row in ops.info() if row.device == "cuda"}


def test_info_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, reason in ((None, "this torch is built without CUDA"), ("13.0", "there is no NVIDIA driver")):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(machine, "driver_version", lambda: 0)
        assert {row[2:] for row in rows_of_info().values()} == {("none", reason)}


def test_info_before_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with emulated_cuda(settled=False):
        rows = rows_of_info()
        assert rows["w8a8_linear, int8"].backend == "cuda"
        assert rows["w8a8_linear, int8"].reason == status.UNPROVEN
        assert rows["attention"].backend == "torch"
        assert settle.settled() is None


def test_info_without_a_library() -> None:
    with emulated_cuda(), unsettled(library=Path("/nowhere/_C_cuda.so")):
        rows = rows_of_info()
        assert rows["w8a8_gemm, fp8"].backend == "torch"
        assert rows["w8a8_gemm, fp8"].reason == "built without CUDA kernels: no nvcc"
        assert rows["prepack_weight"].backend == "none"


def test_info_of_what_was_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with emulated_cuda(settled=False):
        verdicts = {family: Verdict(records.RIGHT) for family in families_of(90, RELEASE)}
        verdicts["norm_activation"] = Verdict(records.WRONG, "rms_norm(...): 1 of 2 elements")
        timings = (Timing("int8", "mma", 4096, 8, 16, 1.0), Timing("int8", "library", 4096, 8, 16, 2.0))
        key = proof.key_of(Gpu(NAME, 90))
        records.store(Record(key, "2026-12-01", verdicts, timings), records.cache_folder())
        rows = rows_of_info()
        assert rows["rms_norm"].backend == "torch"
        assert rows["rms_norm"].reason == "norm_activation failed the proof"
        assert rows["quantize_static"].backend == "cuda"
        ways = "rows: skinny up to 1, up to 8; library up to 16, up to 64, up to 512; mma more"
        assert rows["w8a8_gemm, int8"].reason == ways
        monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", "wgmma")
        assert rows_of_info()["w8a8_gemm, int8"].reason == "SMOOTHQUANT_CUDA_GEMM=wgmma"
