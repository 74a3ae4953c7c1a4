"""What the build promises: objects for every torch >= 2.11 and every Python, and a sentence where it cannot build."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

import smoothquant_ext

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(smoothquant_ext.__file__).parent
OBJECTS = sorted(PACKAGE.glob("*.so"))

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def readelf(*arguments: str | Path) -> str:
    return subprocess.run(["readelf", "--wide", *arguments], capture_output=True, text=True, check=True).stdout


def needed(path: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.+)\]", readelf("--dynamic", path)))


def undefined_symbols(path: Path) -> set[str]:
    return set(re.findall(r"UND (\w+)", readelf("--dyn-syms", path)))


# --- the objects ------------------------------------------------------------------------------------------------------


def test_object_names_carry_no_python_version() -> None:
    assert {path.name for path in OBJECTS} in ({"_C.so"}, {"_C.so", "_C_cuda.so"})


@needs_readelf
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_object_needs_only_torch_libraries_that_every_build_has(path: Path) -> None:
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    allowed = {
        "_C.so": {"libtorch_cpu.so"},
        "_C_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so", "libcublasLt.so.13"},
    }[path.name]
    assert needed(path) - system == allowed


@needs_readelf
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_object_uses_neither_python_nor_torch_internals(path: Path) -> None:
    symbols = undefined_symbols(path)
    unstable = {name for name in symbols if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch)", name)}
    assert not unstable
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)


@needs_readelf
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_object_remembers_no_folder_of_the_build_machine(path: Path) -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", readelf("--dynamic", path))


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs setup.py up to the point where it would build, and returns what it would build."""
    for variable in ("SMOOTHQUANT_CUDA", "SMOOTHQUANT_CUDA_ARCHS", "SMOOTHQUANT_CUBLAS_INCLUDE", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py changes it
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)

    def run(**environment: str | Path) -> dict[str, Any]:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, str(value))
        asked: dict[str, Any] = {}
        monkeypatch.setattr("setuptools.setup", lambda **keywords: asked.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
        return {extension.name: extension for extension in asked["ext_modules"]}

    return run


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder that looks like a CUDA 13 toolkit with cuBLASLt."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    header = tmp_path / "include" / "cublasLt.h"
    header.parent.mkdir()
    header.touch()
    return tmp_path


def test_cuda_is_built_where_it_is_found(run_setup: Any, toolkit: Path) -> None:
    extensions = run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="1")
    assert list(extensions) == ["smoothquant_ext._C", "smoothquant_ext._C_cuda"]
    assert str(toolkit) == cpp_extension.CUDA_HOME


def test_cuda_can_be_left_out(run_setup: Any, toolkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="0")) == ["smoothquant_ext._C"]
    assert "building without CUDA kernels: SMOOTHQUANT_CUDA=0." in capsys.readouterr().err


def break_nothing_there(toolkit: Path) -> None:
    (toolkit / "bin" / "nvcc").unlink()


def break_old_nvcc(toolkit: Path) -> None:
    (toolkit / "bin" / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [(break_nothing_there, "has no bin/nvcc"), (break_old_nvcc, "is 12.8, and 13.x is needed")],
)
def test_missing_cuda_is_a_reason_or_an_error(
    run_setup: Any, toolkit: Path, capsys: pytest.CaptureFixture[str], breaks: Any, reason: str
) -> None:
    breaks(toolkit)
    assert list(run_setup(CUDA_HOME=toolkit)) == ["smoothquant_ext._C"]
    assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"SMOOTHQUANT_CUDA=1, but .*{reason}"):
        run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="1")


def test_missing_cublaslt_header_says_what_brings_it(run_setup: Any, toolkit: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'pip install nvidia-cublas' brings it"):
        run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="1", SMOOTHQUANT_CUBLAS_INCLUDE=tmp_path / "bin")


def test_cuda_architectures(run_setup: Any, toolkit: Path) -> None:
    extensions = run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA_ARCHS="8.0+PTX;90a 120")
    flags = extensions["smoothquant_ext._C_cuda"].extra_compile_args["nvcc"]
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    with pytest.raises(SystemExit, match="SMOOTHQUANT_CUDA_ARCHS has 'hopper'"):
        run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA_ARCHS="hopper")


def test_unknown_cuda_choice_is_an_error(run_setup: Any) -> None:
    with pytest.raises(SystemExit, match="SMOOTHQUANT_CUDA is 'yes', expected 0, 1 or auto"):
        run_setup(SMOOTHQUANT_CUDA="yes")


def test_old_torch_is_an_error(run_setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.raises(SystemExit, match=r"needs torch >= 2.11, found 2.10.1"):
        run_setup()


def test_flags_are_read_from_the_shared_file(run_setup: Any) -> None:
    """The exactness of the numerics rests on these two."""
    flags = run_setup(SMOOTHQUANT_CUDA="0")["smoothquant_ext._C"].extra_compile_args
    assert {"-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020b000000000000"} <= set(flags)
    assert not any(flag.startswith("-march") for flag in flags)
