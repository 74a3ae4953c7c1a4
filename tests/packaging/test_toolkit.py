"""Which CUDA toolkit is used and for which GPUs, or why none is, with scripts in the place of nvcc."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import cuda_toolkit
import pytest
from cuda_toolkit import CudaNotFound, Toolkit, find_toolkit
from fake_toolkit import fake_toolkit, write_nvcc

COMPRESS = "--compress-mode=size"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "cuda"


def found(home: Path, torch_cuda: str | None = None, sites: tuple[Path, ...] = (), **environment: Any) -> Toolkit:
    variables = {"CUDA_HOME": str(home), **{name: str(value) for name, value in environment.items()}}
    return find_toolkit(variables, torch_cuda, sites, [COMPRESS])


def why_not(home: Path, **environment: Any) -> str:
    with pytest.raises(CudaNotFound) as caught:
        found(home, **environment)
    return str(caught.value)


# --- what is used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "archs", "flags"),
    [
        ("12.4", "80 89+PTX 90a", ()),
        ("12.8", "80 89+PTX 90a 100a 120", (COMPRESS,)),
        ("13.0", "80 89+PTX 90a 100a 120", (COMPRESS,)),
    ],
)
def test_nvcc_is_asked_what_it_knows(home: Path, release: str, archs: str, flags: tuple[str, ...]) -> None:
    toolkit = found(fake_toolkit(home, release))
    assert (toolkit.version, " ".join(toolkit.archs), toolkit.flags) == (release, archs, flags)


def test_the_record_names_what_nvcc_does_not_know(home: Path) -> None:
    record = cuda_toolkit.record_of(found(fake_toolkit(home, "12.4")))
    assert record[:3] == (True, "80 89+PTX 90a", "12.4")
    assert record.sentence == (
        "CUDA kernels for 80 89+PTX 90a, compiled by nvcc 12.4; "
        "this nvcc does not know 100a 120, such GPUs compile PTX when they first run it."
    )


def test_default_archs_have_code_or_ptx_for_every_gpu_from_8_0_on() -> None:
    """PTX runs on all that is newer; it is of an architecture that has fp8, so that newer GPUs use theirs."""
    archs = cuda_toolkit.parse_archs(cuda_toolkit.DEFAULT_ARCHS)
    assert archs[0] == "80"
    assert [arch for arch in archs if "+PTX" in arch] == ["89+PTX"]


@pytest.mark.parametrize(
    ("release", "torch_cuda", "remark"),
    [
        ("13.0", "12.8", "they need a driver for CUDA 13, although this torch, for CUDA 12.8, does not"),
        ("13.0", "13.0", None),
        ("12.8", "13.0", None),  # a newer driver runs what an older toolkit made
        ("12.8", "12.6", None),
        ("13.0", None, None),
    ],
)
def test_another_major_version_than_torchs_compiles(
    home: Path, release: str, torch_cuda: str | None, remark: str | None
) -> None:
    assert found(fake_toolkit(home, release), torch_cuda).remarks == ((remark,) if remark else ())


def test_nvcc_on_path_tells_where_its_toolkit_is(home: Path, tmp_path: Path) -> None:
    fake_toolkit(home)
    wrapper = tmp_path / "elsewhere"
    write_nvcc(wrapper, f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert found(Path(), CUDA_HOME="", PATH=wrapper / "bin").home == home


@pytest.mark.parametrize(
    ("release", "folders"),
    [("12.4", ("nvidia/cublas", "nvidia/cu13")), ("13.0", ("nvidia/cu13", "nvidia/cublas"))],
)
def test_cublaslt_header_of_a_wheel_is_found(
    home: Path, tmp_path: Path, release: str, folders: tuple[str, str]
) -> None:
    """That of the toolkit's own version first; one of another will do."""
    (fake_toolkit(home, release) / "include" / "cublasLt.h").unlink()
    for folder in reversed(folders):
        header = tmp_path / folder / "include" / "cublasLt.h"
        header.parent.mkdir(parents=True)
        header.touch()
        assert found(home, sites=(tmp_path,)).includes == (home / "include", header.parent)


def test_folders_that_are_links_are_named_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own folder is not named at all: told of it, it would no longer find its next one."""
    system = fake_toolkit(home) / "include"
    (home / "targets").mkdir()
    (home / "targets" / f"{platform.machine()}-linux").symlink_to(home)
    assert found(home).includes == (system,)
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", system)
    assert found(home).includes == ()


# --- why none is ----------------------------------------------------------------------------------------------------


def test_no_nvcc(home: Path, tmp_path: Path) -> None:
    assert why_not(home) == f"CUDA_HOME={home} has no bin/nvcc"
    assert why_not(home, CUDA_HOME="", PATH=tmp_path) == "there is no nvcc on PATH and CUDA_HOME is not set"


@pytest.mark.parametrize("release", ["11.8", "12.0", "12.3"])
def test_old_nvcc(home: Path, release: str) -> None:
    assert why_not(fake_toolkit(home, release)) == f"{home}/bin/nvcc is {release}, and 12.4 or newer is needed"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("#!/bin/sh\nkill -SEGV $$\n", "'{nvcc} --version' fails: without a word"),
        ("#!/bin/sh\necho nvcc fatal: no license >&2\nexit 1\n", "'{nvcc} --version' fails: nvcc fatal: no license"),
        ("#!/bin/sh\necho hello\n", "'{nvcc} --version' fails: hello"),
        ("#!/there/is/no/shell\n", "{nvcc} does not start: No such file or directory"),
        ("\x7fELF of another machine", "{nvcc} does not start: Exec format error"),
    ],
)
def test_nvcc_that_does_not_run(home: Path, script: str, reason: str) -> None:
    write_nvcc(fake_toolkit(home), script)
    assert why_not(home) == reason.format(nvcc=home / "bin" / "nvcc")


def test_nvcc_that_hangs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "PATIENCE_S", 0.1)
    write_nvcc(fake_toolkit(home), "#!/bin/sh\nexec sleep 60\n")
    assert why_not(home) == f"'{home}/bin/nvcc --version' has not answered for 0.1 s"


def test_nvcc_on_path_that_does_not_say_where_it_is(home: Path) -> None:
    write_nvcc(home, "#!/bin/sh\n")
    reason = f"'{home}/bin/nvcc --dryrun -x cu /dev/null' does not say where the toolkit is; set CUDA_HOME"
    assert why_not(home, CUDA_HOME="", PATH=home / "bin") == reason


def test_nvcc_that_knows_none_of_the_architectures(home: Path) -> None:
    reason = f"nvcc 13.0 does not know one of the architectures {cuda_toolkit.DEFAULT_ARCHS}"
    assert why_not(fake_toolkit(home, archs="200")) == reason


def test_unknown_architecture_that_was_asked_for(home: Path) -> None:
    fake_toolkit(home, "12.4")
    assert found(home, SMOOTHQUANT_CUDA_ARCHS="8.0+PTX;90a").archs == ("80+PTX", "90a")
    reason = "nvcc 12.4 does not know 100a 120 of SMOOTHQUANT_CUDA_ARCHS".replace("12.0", "120")
    assert why_not(home, SMOOTHQUANT_CUDA_ARCHS="80 100a 120") == reason
    with pytest.raises(ValueError, match=r"^SMOOTHQUANT_CUDA_ARCHS has 'hopper', expected a list such as '80 .*'\.$"):
        found(home, SMOOTHQUANT_CUDA_ARCHS="hopper")


@pytest.mark.parametrize(("release", "package"), [("12.4", "nvidia-cublas-cu12"), ("13.0", "nvidia-cublas")])
def test_no_cublaslt_header(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, package: str
) -> None:
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", tmp_path)
    (fake_toolkit(home, release) / "include" / "cublasLt.h").unlink()
    brings = f"'pip install {package}' brings it"
    assert why_not(home) == f"cublasLt.h is neither in the toolkit nor beside torch; {brings}"
    assert why_not(home, SMOOTHQUANT_CUBLAS_INCLUDE="/nowhere") == f"cublasLt.h is not in /nowhere; {brings}"


# --- what compilers say ---------------------------------------------------------------------------------------------

NINJA = """[1/3] c++ -MMD -MF /b/devices.o.d -fno-error -c /s/csrc/cuda/devices.cpp -o /b/csrc/cuda/devices.o
[2/3] /cuda/bin/nvcc --generate-dependencies-with-compile -c /s/csrc/cuda/mma.cu -o /b/csrc/cuda/mma.o
FAILED: [code=1] /b/csrc/cuda/mma.o
/cuda/bin/nvcc --generate-dependencies-with-compile --no-fatal -c /s/csrc/cuda/mma.cu -o /b/csrc/cuda/mma.o
{message}
ninja: build stopped: subcommand failed.
"""


@pytest.mark.parametrize(
    "message",
    [
        '/s/csrc/cuda/mma.cu(12): error: identifier "frob" is undefined',
        "/cuda/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 13",
        "nvcc error   : 'cicc' died due to signal 11 (Invalid memory reference)",
        "nvcc fatal   : Could not open input file",
        "Segmentation fault (core dumped)",
        "Killed",
        "ptxas: something that nobody has seen yet",
    ],
)
def test_the_line_that_says_what_is_wrong(home: Path, message: str) -> None:
    toolkit = found(fake_toolkit(home, "12.8"))
    sources = ["csrc/cuda/devices.cpp", "csrc/cuda/mma.cu"]
    output = NINJA.format(message=f"{message}\n1 error detected in the compilation" if "frob" in message else message)
    reason = f"csrc/cuda/mma.cu does not compile with nvcc 12.8: {message}"
    assert cuda_toolkit.why_not_compiled(output, toolkit, sources) == reason


def test_a_linker_that_fails(home: Path) -> None:
    output = "/usr/bin/ld: cannot find -lcudart_static: No such file\ncollect2: error: ld returned 1 exit status\n"
    assert cuda_toolkit.why_not_compiled(output, found(fake_toolkit(home, "12.8")), ["a.cu"]) == (
        "the CUDA object does not link: /usr/bin/ld: cannot find -lcudart_static: No such file"
    )


def test_output_is_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "new" / "log"
    with cuda_toolkit.copied_output(log):
        os.system("echo child; echo error >&2")
    os.system("echo after")
    assert log.read_text() == "child\nerror\n"
    assert capfd.readouterr().out.splitlines()[-1] == "after"
