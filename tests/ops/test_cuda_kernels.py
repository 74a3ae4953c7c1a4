"""Whether CUDA kernels run here and why not, each way simulated; the table of what was validated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from smoothquant_ext.ops.cuda_kernels import (
    Facts,
    Gpu,
    Validation,
    choose,
    has_code_for,
    read_validations,
    why_not_at_all,
)

import smoothquant_ext
from smoothquant_ext import ops
from smoothquant_ext.ops import backends, cuda_kernels
from smoothquant_ext.ops.declare import DECLARED

A100, L4, H100 = Gpu("NVIDIA A100", 80), Gpu("NVIDIA L4", 89), Gpu("NVIDIA H100", 90)
B200, T4 = Gpu("NVIDIA B200", 100), Gpu("Tesla T4", 75)
RELEASE = "80+PTX 89 90a 100a 120"
GOOD = Facts("13.0", "", 13000, (H100,), RELEASE)
UNTIMED = "our own kernels are untimed: SMOOTHQUANT_CUDA_GEMM=mma or wgmma tries them"
ON_CPU = "what is on the CPU runs there"
VALIDATED = Validation("NVIDIA H200", 90, ("quantize", "gemm_int8"), "2026-12-01", "abc1234", "cuda-h200.json")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMOOTHQUANT_UNVALIDATED_CUDA", raising=False)
    monkeypatch.delenv("SMOOTHQUANT_CUDA_GEMM", raising=False)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (GOOD, ""),
        (GOOD._replace(torch_cuda=None), "this torch is built without CUDA; what is on the CPU runs there"),
        (
            GOOD._replace(library_error="_C_cuda.so is missing"),
            f"_C_cuda.so is missing; {ON_CPU}, and 8-bit layers on a GPU raise an error",
        ),
        (GOOD._replace(driver=0), "there is no NVIDIA driver; what is on the CPU runs there"),
        (
            GOOD._replace(driver=12040),
            "the NVIDIA driver is for CUDA 12.4, and torch needs 13.0: update it; what is on the CPU runs there",
        ),
        (
            GOOD._replace(gpus=()),
            "the driver shows no GPU (is CUDA_VISIBLE_DEVICES set?); what is on the CPU runs there",
        ),
        (
            GOOD._replace(gpus=(H100, T4)),
            "Tesla T4 has compute capability 7.5, and the kernels are built for 80+PTX 89 90a 100a 120",
        ),
        (
            GOOD._replace(gpus=(B200,), archs="80 90a"),
            "NVIDIA B200 has compute capability 10.0, and the kernels are built for 80 90a",
        ),
    ],
)
def test_every_reason_is_a_sentence(facts: Facts, sentence: str) -> None:
    assert why_not_at_all(facts) == sentence
    if sentence:
        assert choose(facts, ("quantize",), [VALIDATED]) == ("none", sentence)


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


def test_what_was_validated_runs_and_says_where() -> None:
    validated = "validated on NVIDIA H200, 2026-12-01, abc1234"
    assert choose(GOOD, ("quantize",), [VALIDATED]) == ("cuda", validated)
    assert choose(GOOD, ("gemm_int8",), [VALIDATED]) == ("cuda", f"{validated}; {UNTIMED}")


def test_what_was_not_validated_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, reason = choose(GOOD, ("quantize", "gemm_fp8"), [VALIDATED])
    assert backend == "none"
    assert reason == "gemm_fp8 not validated on compute capability 9.0; SMOOTHQUANT_UNVALIDATED_CUDA=1 allows it"
    backend, reason = choose(GOOD._replace(gpus=(H100, A100)), ("quantize",), [VALIDATED])
    assert backend == "none"
    assert "quantize not validated on compute capability 8.0" in reason
    monkeypatch.setenv("SMOOTHQUANT_UNVALIDATED_CUDA", "1")
    backend, reason = choose(GOOD, ("quantize", "gemm_fp8"), [VALIDATED])
    assert backend == "cuda"
    allowed = "gemm_fp8 not validated on compute capability 9.0; allowed by SMOOTHQUANT_UNVALIDATED_CUDA=1"
    assert reason == f"{allowed}; {UNTIMED}"


OWN = Validation("NVIDIA H200", 90, ("quantize", "gemm_mma"), "2026-12-01", "abc1234", "cuda-h200.json")


@pytest.mark.parametrize(
    ("request_", "gpu", "family", "backend", "sentence"),
    [
        ("mma", H100, "gemm_int8", "cuda", "SMOOTHQUANT_CUDA_GEMM=mma: our own tensor-core kernels; validated on"),
        ("mma", A100, "gemm_int8", "none", "gemm_mma not validated on compute capability 8.0"),
        ("wgmma", H100, "gemm_fp8", "none", "gemm_wgmma not validated on compute capability 9.0"),
        ("auto", H100, "gemm_int8", "none", "gemm_wgmma not validated on compute capability 9.0"),
        ("wgmma", B200, "gemm_int8", "none", "SMOOTHQUANT_CUDA_GEMM is wgmma, which NVIDIA B200 has no instructions"),
        ("mma", A100, "gemm_fp8", "none", "SMOOTHQUANT_CUDA_GEMM is mma, which NVIDIA A100 has no instructions for"),
        ("cutlass", H100, "gemm_int8", "none", "SMOOTHQUANT_CUDA_GEMM is 'cutlass', expected library, mma, wgmma"),
        ("cutlass", H100, "quantize", "cuda", "validated on"),
        ("library", A100, "gemm_int8", "none", "gemm_int8 not validated"),
    ],
)
def test_our_own_products_have_to_be_asked_for(
    request_: str, gpu: Gpu, family: str, backend: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", request_)
    chosen = choose(GOOD._replace(gpus=(gpu,)), (family,), [OWN])
    assert chosen.backend == backend
    assert chosen.reason.startswith(sentence)


def test_what_is_untimed_is_named_where_it_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHQUANT_UNVALIDATED_CUDA", "1")
    for gpu, family, names in (
        (H100, "gemm_fp8", "mma or wgmma"),
        (B200, "gemm_fp8", "mma"),
        (A100, "gemm_int8", "mma"),
        (A100, "gemm_fp8", ""),
        (H100, "norm_activation", ""),
    ):
        reason = choose(GOOD._replace(gpus=(gpu,)), (family,), []).reason
        assert ("untimed" in reason) == bool(names)
        assert f"SMOOTHQUANT_CUDA_GEMM={names} tries them" in reason or not names


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (A100, "NVIDIA A100 has no fp8 tensor cores: values are widened to bf16 and multiplied at its speed"),
        (L4, "cuBLASLt takes no scales per row on NVIDIA L4: they are another pass over the result"),
        (H100, ""),
        (B200, "cuBLASLt takes no scales per row on NVIDIA B200: they are another pass over the result"),
    ],
)
def test_fp8_says_what_the_hardware_lacks(gpu: Gpu, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHQUANT_UNVALIDATED_CUDA", "1")
    facts = GOOD._replace(gpus=(gpu,))
    for families in (("gemm_fp8",), ("quantize", "gemm_fp8")):
        backend, said = choose(facts, families, [])
        assert backend == "cuda"
        assert said.startswith(reason)
    assert "fp8" not in choose(facts, ("gemm_int8",), []).reason


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_speaks_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "gather", lambda _: GOOD)
    monkeypatch.setattr(cuda_kernels, "read_validations", lambda: [VALIDATED])
    rows = {row.op: row for row in ops.info() if row.device == "cuda"}
    assert rows["w8a8_linear, int8"].backend == "cuda"
    assert rows["w8a8_linear, fp8"].backend == "none"
    assert rows["rms_norm"].backend == "none"
    assert rows["attention"].reason == "for the CPU only: on a GPU transformers' own is used"


@pytest.mark.parametrize(
    ("version", "driver", "count", "reason"),
    [
        (None, 0, 0, "this torch is built without CUDA"),
        ("13.0", 0, 0, "there is no NVIDIA driver"),
        ("13.0", 12020, 0, "the NVIDIA driver is for CUDA 12.2, and torch needs 13.0"),
        ("13.2", 13000, 0, "the driver shows no GPU"),
        ("13.0", 13000, 1, "Tesla T4 has compute capability 7.5"),
    ],
)
def test_facts_come_from_torch(
    version: str | None, driver: int, count: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        name, major, minor = "Tesla T4", 7, 5

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(cuda_kernels, "driver_version", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.ops.sq, "_cuda_archs", lambda: RELEASE)
    monkeypatch.setattr(backends, "_cuda_missing", "")
    rows = [row for row in ops.info() if row.device == "cuda"]
    assert {row.backend for row in rows} == {"none"}
    assert all(row.reason.startswith(reason) for row in rows)


class Driver:
    """What ctypes loads in the place of libcuda."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return self.status


def test_the_driver_says_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, version in ((0, 12040), (1, 0)):
        monkeypatch.setattr(cuda_kernels.ctypes, "CDLL", lambda _, status=status: Driver(status))
        assert cuda_kernels.driver_version() == version
    monkeypatch.undo()
    monkeypatch.setattr(cuda_kernels.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError()))
    assert cuda_kernels.driver_version() == 0


def test_the_table_names_the_ops_that_have_cuda_kernels() -> None:
    root = Path(smoothquant_ext.__file__).parents[1]
    paths = [*(root / "csrc" / "cuda" / "ops").glob("*.cpp"), *(root / "csrc" / "common").glob("*_ops.h")]
    sources = "".join(path.read_text() for path in paths)
    implemented = set(re.findall(r'm\.impl\("(\w+)"', sources))
    assert {name for name, declaration in DECLARED.items() if declaration.cuda} == implemented
    assert all(bool(declaration.cuda) != bool(declaration.why_not_cuda) for declaration in DECLARED.values())
    families = re.search(r"kFamilies\[\] = \{(.+?)\}", (root / "csrc" / "cuda" / "compute" / "devices.cpp").read_text())
    assert families is not None
    assert tuple(re.findall(r'"(\w+)"', families[1])) == cuda_kernels.FAMILIES


# --- the table of validations -----------------------------------------------------------------------------------------


def test_the_table_that_is_shipped_can_be_read() -> None:
    for entry in read_validations():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)
        assert re.fullmatch(r"[0-9a-f]{7,40}", entry.commit)


def write_table(path: Path, **changes: Any) -> Path:
    entry = {**VALIDATED._asdict(), **changes}
    path.write_text(json.dumps({"validated": [{key: value for key, value in entry.items() if value is not None}]}))
    return path


def test_a_table_is_read_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert read_validations(write_table(path)) == [VALIDATED]
    with pytest.raises(
        ValueError,
        match=r"there are no kernels \['gem'\], only " + ", ".join(cuda_kernels.FAMILIES),
    ):
        read_validations(write_table(path, kernels=["gem"]))
    with pytest.raises(ValueError, match=r"an entry has .* expected"):
        read_validations(write_table(path, commit=None))


def test_the_library_is_told_what_was_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends, "_load_library", lambda _: None)
    monkeypatch.setattr(cuda_kernels, "read_validations", lambda: [VALIDATED])
    monkeypatch.setattr(torch.ops.sq, "_set_cuda_validated", lambda *arguments: told.append(arguments))
    assert backends._load_cuda() == ""
    assert told == [("quantize", 90), ("gemm_int8", 90)]
