"""What the build promises: objects for every torch >= 2.11 and every Python, and a sentence where it cannot build."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from fake_toolkit import CRASHES, DIES_INSIDE, FAILS, fake_toolkit
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
        "_C_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
    }[path.name]
    assert needed(path) - system == allowed


@needs_readelf
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_object_uses_neither_python_nor_torch_internals(path: Path) -> None:
    symbols = undefined_symbols(path)
    unstable = {name for name in symbols if re.match(r"_?Py|_ZN?K?(2at|3c10|5torch)", name)}
    assert not unstable
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)
    # They are looked up at run time, so that no version is bound: see cublaslt_library.h.
    assert not {name for name in symbols if name.startswith("cublas")}


@needs_readelf
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_object_remembers_no_folder_of_the_build_machine(path: Path) -> None:
    assert not re.search(r"\((RPATH|RUNPATH)\)", readelf("--dynamic", path))


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs setup.py up to the point where it would build, and returns what it asks setuptools for."""
    for variable in ("SMOOTHQUANT_CUDA", "SMOOTHQUANT_CUDA_ARCHS", "SMOOTHQUANT_CUBLAS_INCLUDE", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # setup.py changes it
    monkeypatch.setattr("sys.path", [*sys.path])
    for name in ("CUDA_HOME", "_check_cuda_version"):
        monkeypatch.setattr(cpp_extension, name, getattr(cpp_extension, name))

    def run(**environment: str | Path) -> dict[str, Any]:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, str(value))
        keywords: dict[str, Any] = {}
        monkeypatch.setattr("setuptools.setup", lambda **given: keywords.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
        return keywords

    return run


@pytest.fixture
def run_setup(asked: Any) -> Any:
    """The extensions that setup.py would build, by name."""
    return lambda **environment: {extension.name: extension for extension in asked(**environment)["ext_modules"]}


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return fake_toolkit(tmp_path / "cuda")


def test_cuda_is_built_where_it_is_found(run_setup: Any, toolkit: Path) -> None:
    extensions = run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="1")
    assert list(extensions) == ["smoothquant_ext._C", "smoothquant_ext._C_cuda"]
    assert str(toolkit) == cpp_extension.CUDA_HOME


def test_cuda_can_be_left_out(run_setup: Any, toolkit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="0")) == ["smoothquant_ext._C"]
    assert "built without CUDA kernels: SMOOTHQUANT_CUDA=0." in capsys.readouterr().err


def test_missing_cuda_is_a_reason_or_an_error(
    run_setup: Any, toolkit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every reason is in test_toolkit.py."""
    (toolkit / "bin" / "nvcc").unlink()
    reason = f"CUDA_HOME={toolkit} has no bin/nvcc"
    assert list(run_setup(CUDA_HOME=toolkit)) == ["smoothquant_ext._C"]
    assert f"smoothquant-ext: built without CUDA kernels: {reason}.\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"^smoothquant-ext: SMOOTHQUANT_CUDA=1, but {reason}.$"):
        run_setup(CUDA_HOME=toolkit, SMOOTHQUANT_CUDA="1")


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


# --- compiling CUDA ---------------------------------------------------------------------------------------------------

SOURCE = "csrc/cuda/kernels/one.cu"


@pytest.fixture
def build(asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a CUDA object of one source with setup.py's own command; returns the names in the package."""
    monkeypatch.chdir(tmp_path)
    Path(SOURCE).parent.mkdir(parents=True)
    Path(SOURCE).touch()

    def run(is_editable: bool = False, **environment: str | Path) -> set[str]:
        keywords = asked(CUDA_HOME=tmp_path / "cuda", **environment)
        (extension,) = [found for found in keywords["ext_modules"] if found.name.endswith("_C_cuda")]
        extension.sources, extension.depends = [SOURCE], []
        distribution = setuptools.Distribution(
            {"name": "smoothquant-ext", "packages": ["smoothquant_ext"], "ext_modules": [extension]}
        )
        command = keywords["cmdclass"]["build_ext"](distribution)
        command.build_lib, command.inplace = "lib", is_editable
        package = Path("smoothquant_ext" if is_editable else "lib/smoothquant_ext")
        package.mkdir(parents=True, exist_ok=True)
        (package / "_C_cuda.so").write_text("left by an earlier build")
        command.ensure_finalized()
        command.run()
        assert all(Path(output).is_file() for output in command.get_outputs())
        return {
            path.name for path in package.iterdir() if path.read_text(errors="replace") != "left by an earlier build"
        }

    return run


def record_in(package: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(package, "_build.json").read_text())
    return record


@pytest.mark.parametrize("is_editable", [False, True])
def test_what_was_built_is_recorded(build: Any, toolkit: Path, is_editable: bool) -> None:
    assert build(is_editable) == {"_C_cuda.so", "_build.json"}
    assert record_in("smoothquant_ext" if is_editable else "lib/smoothquant_ext") == {
        "cuda": True,
        "archs": "80 89+PTX 90a 100a 120",
        "nvcc": "13.0",
        "sentence": "CUDA kernels for 80 89+PTX 90a 100a 120, compiled by nvcc 13.0.",
    }


def test_torch_for_another_cuda_does_not_abort(build: Any, toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own check raises an error."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert build() == {"_C_cuda.so", "_build.json"}
    assert "they need a driver for CUDA 13" in record_in("lib/smoothquant_ext")["sentence"]


@pytest.mark.parametrize(
    ("compiles", "reason"),
    [
        (FAILS, 'one.cu(12): error: identifier "frob" is undefined'),
        (CRASHES, "Segmentation fault"),
        (DIES_INSIDE, "nvcc error   : 'cicc' died due to signal 11 (Invalid memory reference)"),
        ('echo text > "$output"', "one.o:0: syntax error"),
    ],
)
@pytest.mark.parametrize("is_editable", [False, True])
def test_nvcc_that_fails_costs_the_cuda_part_only(
    build: Any, toolkit: Path, is_editable: bool, compiles: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_toolkit(toolkit, compiles=compiles)
    assert build(is_editable) == {"_build.json"}
    record = record_in("smoothquant_ext" if is_editable else "lib/smoothquant_ext")
    sentence = record.pop("sentence")
    assert record == {"cuda": False, "archs": "", "nvcc": ""}
    what = "the CUDA object does not link" if "syntax" in reason else f"{SOURCE} does not compile with nvcc 13.0"
    assert sentence.startswith(f"built without CUDA kernels: {what}: ")
    assert reason in sentence
    assert f"smoothquant-ext: {sentence}\n" in capfd.readouterr().err


def test_nvcc_that_fails_is_an_error_where_cuda_is_asked_for(build: Any, toolkit: Path) -> None:
    fake_toolkit(toolkit, compiles=FAILS)
    with pytest.raises(
        SystemExit, match=rf"^smoothquant-ext: SMOOTHQUANT_CUDA=1, but {SOURCE} does .* is undefined\.$"
    ):
        build(SMOOTHQUANT_CUDA="1")


# --- settings and flags -----------------------------------------------------------------------------------------------


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
