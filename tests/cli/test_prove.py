"""``prove`` and ``info`` on the emulated device, whose kernels are right, wrong or missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import complaint, smoothquant
from emulated_cuda import NAME, emulated_cuda, unsettled
from emulation import ROOT

from smoothquant_ext.ops.cuda import proof, records

CHILD = ROOT / "tests" / "support" / "emulated_child.py"

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with one GPU on which nothing was proven, and two families of kernels."""
    monkeypatch.setattr(proof, "CHILD", (str(CHILD),))
    monkeypatch.setattr(proof, "families_of", lambda _arch, _archs: ("quantize", "skinny_int8"))
    monkeypatch.setenv("PYTHONPATH", str(CHILD.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SQ_EMULATED_CASES", "2")
    monkeypatch.setenv("COLUMNS", "200")
    with emulated_cuda(settled=False):
        yield


@pytest.mark.usefixtures("machine")
def test_prove_shows_verdicts_and_times_and_info_repeats_them() -> None:
    said = smoothquant("prove")
    assert f"proving and timing the CUDA kernels on {NAME}, once" in said.stderr
    assert "quantize: right" in said.stderr
    assert f"CUDA kernels on {NAME}" in said.stdout
    assert "proven 20" in said.stdout
    assert "Microseconds of a product" in said.stdout
    assert "skinny_int8" in smoothquant("info").stdout
    again = smoothquant("prove", "--json")
    assert again.stderr == ""
    assert [records.from_json(each).key.gpu for each in json.loads(again.stdout)] == [NAME]


@pytest.mark.usefixtures("machine")
def test_a_wrong_kernel_is_shown_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQ_EMULATED_FAULT", "wrong quantize")
    said = smoothquant("prove", code=1)
    assert "quantize: wrong" in said.stderr
    assert "1 of 577 elements are wrong" in " ".join(said.stdout.split())
    monkeypatch.delenv("SQ_EMULATED_FAULT")
    smoothquant("prove", code=1)  # it is kept
    smoothquant("prove", "--again")
    smoothquant("prove")


def test_without_a_gpu_there_is_nothing_to_prove(monkeypatch: pytest.MonkeyPatch) -> None:
    assert complaint("prove") == "there are no CUDA kernels to prove here: this torch is built without CUDA"
    with emulated_cuda(), unsettled(library=Path("/nowhere/_C_cuda.so")):
        assert complaint("prove") == "there are no CUDA kernels to prove here: built without CUDA kernels: no nvcc"


RANK = """
import sys
sys.path.insert(0, {support!r})
import torch
from emulated_cuda import emulated_cuda
from smoothquant_ext import ops
from smoothquant_ext.ops.cuda import proof
with emulated_cuda(settled=False):
    proof.CHILD = ({child!r},)
    proof.families_of = lambda _arch, _archs: ("quantize",)
    ops.quantize_per_token(torch.ones(2, 16).to("cuda"), torch.int8)
"""


def test_two_processes_make_one_proof(tmp_path: Path) -> None:
    script = RANK.format(support=str(CHILD.parent), child=str(CHILD))
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "SQ_EMULATED_CASES": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{CHILD.parent}",
    }
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert sum("proving and timing the CUDA kernels" in each for each in said) == 1, said
