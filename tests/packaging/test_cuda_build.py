"""What the compiled CUDA object holds, and what cuBLASLt thinks of our descriptions: no GPU is needed to see either."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import smoothquant_ext

ROOT = Path(__file__).resolve().parents[2]
OBJECT = Path(smoothquant_ext.__file__).with_name("_C_cuda.so")
NVIDIA = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"  # where NVIDIA's wheels lie
CUOBJDUMP = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(NVIDIA / "bin"))

needs_object = pytest.mark.skipif(not OBJECT.is_file(), reason="_C_cuda.so is not built")
needs_cuobjdump = pytest.mark.skipif(
    CUOBJDUMP is None or shutil.which("nvdisasm", path=f"{Path(CUOBJDUMP or '').parent}") is None,
    reason="cuobjdump and nvdisasm are not installed ('make cuda-headers' brings them)",
)


def dump(*arguments: str) -> str:
    assert CUOBJDUMP is not None
    return subprocess.run([CUOBJDUMP, *arguments, OBJECT], capture_output=True, text=True, check=True).stdout


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack, shared and local memory."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            usage = {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
            found[arch, kernel] = usage
    return found


@cache
def instructions(arch: str) -> dict[str, Counter[str]]:
    """Kernel -> how often it has each instruction, with its modifiers."""
    found: dict[str, Counter[str]] = {}
    kernel = ""
    for line in dump("-sass", "-arch", arch).splitlines():
        if match := re.match(r"\s*Function : (\w+)", line):
            kernel = match[1]
            found.setdefault(kernel, Counter())
        elif match := re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            found[kernel][match[1]] += 1
    return found


def architectures() -> list[str]:
    return sorted({arch for arch, _ in resources()})


def count(kernel: Counter[str], pattern: str) -> int:
    return sum(times for name, times in kernel.items() if re.fullmatch(pattern, name))


KERNELS = ("quantize_rows", "quantize_static", "norm_rows", "activate_rows", "skinny_gemm", "epilogue", "widen")
KERNELS += ("mma_gemm", "wgmma_gemm", "align_scales", "route", "combine", "grouped_skinny", "grouped_mma")
TYPES = {"3": "S8", "4": "E4M3", "5": "E5M2"}  # the numbers of DType in mangled names


@needs_object
@needs_cuobjdump
def test_every_kernel_is_there_for_every_architecture() -> None:
    for arch in architectures():
        mangled = [kernel for own, kernel in resources() if own == arch]
        for name in KERNELS:
            assert any(f"{name}_kernel" in kernel for kernel in mangled), (arch, name)


def number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def own_types(kernel: str) -> tuple[str, ...]:
    """Of a and b, if it is one of our own tensor-core products."""
    if match := re.search(r"grouped_mma_kernelILNS_5DTypeE(\d)E", kernel):
        return (TYPES[match[1]], TYPES[match[1]])
    match = re.search(r"mma_gemm_kernelILNS_5DTypeE(\d)ELS1_(\d)E", kernel)
    return (TYPES[match[1]], TYPES[match[2]]) if match else ()


def own_tile(kernel: str) -> tuple[int, int, int]:
    """Of mma.cuh's products: rows of a tile, and of a warp rows and columns."""
    match = re.search(r"MmaShapeILi(\d+)E", kernel)
    return {128: (128, 64, 32), 64: (64, 64, 16), 32: (32, 32, 16)}[int(match[1]) if match else 128]


@needs_object
@needs_cuobjdump
def test_no_kernel_spills() -> None:
    for (arch, kernel), usage in resources().items():
        allowed = 0
        if number(arch) >= 100:
            # Some registers at the limit of two blocks, and the rare way of rows that are read twice.
            rare = {"skinny_gemm_kernelIiLi8": 8, "grouped_skinny_kernelIi": 40, "quantize_rows.*Li0E": 32, "append": 8}
            allowed = max((size for name, size in rare.items() if re.search(name, kernel)), default=0)
        assert usage["STACK"] <= allowed, (arch, kernel, usage)
        assert usage["LOCAL"] == 0, (arch, kernel, usage)


@needs_object
@needs_cuobjdump
def test_kernels_declare_no_more_shared_memory_than_a_launch_counts_on() -> None:
    """kMostStatic of shared_memory.h; from 9.0 on, the driver keeps another 1024 bytes, which are not asked for."""
    for (arch, kernel), usage in resources().items():
        kept = 1024 if number(arch) >= 90 else 0
        assert usage["SHARED"] <= 1024 + kept, (arch, kernel, usage)


@needs_object
@needs_cuobjdump
def test_registers_leave_room_for_the_blocks_that_are_meant_to_run_together() -> None:
    for (arch, kernel), usage in resources().items():
        if "skinny" in kernel:  # 256 threads: two blocks, but one of 8 rows of fp8
            assert usage["REG"] <= (255 if "IfLi8" in kernel else 128), (arch, kernel)
        elif own_types(kernel):
            is_int8, is_mma = "S8" in own_types(kernel), "wgmma" not in kernel
            # 256 threads: two blocks of mma, but one of fp8 above 32 rows; 288 threads: one of wgmma.
            two = is_int8 or own_tile(kernel)[0] == 32
            assert usage["REG"] <= (128 if two and is_mma else 255 if is_mma else 224), (arch, kernel, usage)
        elif "norm_rows" in kernel or "activate_rows" in kernel or "quantize_rows" in kernel:  # up to 512 threads
            assert usage["REG"] <= 128, (arch, kernel)
        elif "append" in kernel:  # 128 threads
            assert usage["REG"] <= 80, (arch, kernel)
        else:
            assert usage["REG"] <= 64, (arch, kernel)


@needs_object
@needs_cuobjdump
def test_machine_code_has_the_instructions_that_it_is_meant_to_have() -> None:
    for arch in architectures():
        for kernel, found in instructions(arch).items():
            if match := re.search(r"skinny(?:_gemm)?_kernelI([if])Li(\d)ELi(\d)E", kernel):
                rows, columns = int(match[2]), int(match[3])
                if match[1] == "i":  # 16 bytes of a row and a column are four dp4a
                    assert count(found, r"IDP\.4A\.S8\.S8.*") >= 4 * rows * columns, (arch, kernel)
                else:  # and as many multiply-adds as values
                    assert count(found, r"FFMA.*") >= 16 * rows * columns, (arch, kernel)
                # The weight's stream passes L1 by; rows of the activation stay there.
                assert count(found, r"LDG\.E\.NA\.128.*") >= columns, (arch, kernel)
                assert count(found, r"LDG\.E\.128.*") >= rows, (arch, kernel)
            elif match := re.search(r"(quantize|norm)_rows_kernelI\w*Li([1-8])E", kernel):
                assert count(found, r"LDG\.E\.128.*") >= int(match[2]), (arch, kernel)
                assert not count(found, r"LDG\.E\.U8.*"), (arch, kernel)
            elif "epilogue_kernel" in kernel or "activate_rows" in kernel:
                assert count(found, r"LDG\.E\.128.*") >= 1, (arch, kernel)


@needs_object
@needs_cuobjdump
def test_kernels_that_do_not_rotate_pay_nothing_for_those_that_do() -> None:
    """5 shuffles find the largest magnitude of a warp; a rotation exchanges the 8 values of each group."""
    rotating = r"(quantize_rows|quantize_static|activate_rows)_kernelI\w*?(?:Li(\d)E)?Lb([01])EEE"
    for arch in architectures():
        for kernel, found in instructions(arch).items():
            if match := re.search(rotating, kernel):
                shuffles, plain = count(found, r"SHFL\.BFLY.*"), 0 if match[1] == "quantize_static" else 5
                groups = max(1, int(match[2] or 1))
                assert shuffles >= plain + 8 * groups if match[3] == "1" else shuffles == plain, (arch, kernel)


@needs_object
@needs_cuobjdump
def test_fp8_is_converted_by_the_hardware_that_can() -> None:
    for arch in architectures():
        has_fp8 = number(arch) >= 89
        for kernel, found in instructions(arch).items():
            if "quantize_rows" in kernel:
                assert bool(count(found, r"F2FP\.(SATFINITE\.)?E[45]M[32].*")) == has_fp8, (arch, kernel)


@needs_object
@needs_cuobjdump
def test_tensor_cores_multiply_where_they_are_meant_to() -> None:
    """A tile of k, 64 x 32 sums of a warp, 64 x 128 or swapped 64 x 64 of a warpgroup; operands on their own ways."""
    for arch in architectures():
        for kernel, found in instructions(arch).items():
            types = own_types(kernel)
            if "wgmma" in kernel:
                is_swapped = "ELb1E" in kernel
                shape, operands = ("64x64x32", types[::-1]) if is_swapped else ("64x128x32", types)
                name = f"IGMMA.{shape}.S8.S8" if "S8" in types else f"QGMMA.{shape}.F32.{'.'.join(operands)}"
                is_there = arch == "sm_90a"
                assert found[name] == count(found, r"[A-Z]+GMMA.*") == (4 if is_there else 0), (arch, kernel)
                assert found["UTMALDG.2D"] == (2 if is_there else 0), (arch, kernel)
                assert bool(count(found, r"SYNCS\..*TRYWAIT")) == is_there, (arch, kernel)
            elif types:
                # Two instructions of k = 32; GPUs without one for fp8 have four of k = 16 in fp16.
                rows, own_rows, own_columns = own_tile(kernel)
                fragments = own_rows // 16 * (own_columns // 8)
                products = count(found, r"IMMA\.16832\.S8\.S8" if "S8" in types else r"QMMA\.16832.*|HMMA\.16816\.F32")
                is_there = "S8" in types or number(arch) >= 89
                # On some of these, nvcc unrolls the ring of three stages.
                times = 3 if number(arch) >= 100 and products > 4 * fragments else 1
                assert products in ((2 * fragments * times, 4 * fragments * times) if is_there else (0,)), (
                    arch,
                    kernel,
                )
                loads, copies = 2 * (own_rows + own_columns) // 16, (2 + times) * (-(-rows // 64) + 2)
                assert count(found, r"LDSM\.16\.M88\.4") == (loads * times if is_there else 0), (arch, kernel)
                assert count(found, r"LDGSTS.*\.128.*") == (copies if is_there else 0), (arch, kernel)


# --- libraries -------------------------------------------------------------------------------------------------------


class Cuda(NamedTuple):
    """What it takes to compile host code."""

    includes: tuple[Path, ...]
    libraries: Path


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False) if nvcc else None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE) if dry_run else None
    return Path(top[1]).resolve() if top else None


def find_cuda(name: str) -> Cuda:
    if name == "newest":
        cuda = Cuda(((toolkit() or Path("nowhere")) / "include", NVIDIA / "include"), NVIDIA / "lib")
    else:
        wheels = ROOT / "build" / "cuda-12.4" / "nvidia"
        parts = ("cuda_runtime", "cuda_nvcc", "cuda_cccl", "cublas")
        cuda = Cuda(tuple(wheels / part / "include" for part in parts), wheels / "cublas" / "lib")
    if not all(folder.is_dir() for folder in cuda.includes):
        pytest.skip(
            "these headers are not here: 'make cuda-headers oldest-cuda' brings them, and nvcc comes with the rest"
        )
    return cuda


@pytest.fixture(scope="session", params=["newest", "oldest"])
def cuda(request: pytest.FixtureRequest) -> Cuda:
    return find_cuda(request.param)


def compile_host(cuda: Cuda, *arguments: str | Path) -> None:
    torch_dir = Path(torch.__file__).parent
    lines = (ROOT / "csrc" / "flags.txt").read_text().splitlines()
    flags = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("cxx", "torch"))]
    flags += ["-O0", "-Werror", "-Wno-attributes", "-DUSE_CUDA", '-DSQ_CUDA_ARCHS="80"', f"-I{ROOT / 'csrc'}"]
    flags += [part for path in (torch_dir / "include", *cuda.includes) for part in ("-isystem", str(path))]
    subprocess.run(["c++", *flags, *arguments], check=True)


def program_of(cuda: Cuda, target: Path, *sources: str) -> Path:
    """Compiles one of tests/native/emulation/*.cpp with what it needs of csrc/."""
    folder = Path(torch.__file__).parent / "lib"
    libraries = (f"-L{folder}", "-ltorch_cpu", "-lc10", "-ldl", f"-Wl,-rpath,{folder}")
    compile_host(cuda, *(ROOT / source for source in sources), "-o", target, *libraries)
    return target


def run_with(libraries: Path | None, program: Path, *arguments: str | Path) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries or "")}
    result = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


HOST_SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").glob("*/*.cpp"))
LIBRARY_SOURCE = "csrc/cuda/compute/cublaslt_library.cpp"


@pytest.mark.parametrize("source", HOST_SOURCES)
def test_host_code_compiles_with_the_oldest_headers(source: str) -> None:
    compile_host(find_cuda("oldest"), "-fsyntax-only", ROOT / source)


def test_cublaslt_accepts_every_description(tmp_path: Path, cuda: Cuda) -> None:
    """Whichever version the headers are of, and whichever torch loads."""
    program = program_of(cuda, tmp_path / "program", "tests/native/emulation/lt_descriptors.cpp", LIBRARY_SOURCE)
    assert run_with(find_cuda("newest").libraries, program).startswith("cuBLASLt 13")
    assert run_with(find_cuda("oldest").libraries, program).startswith("cuBLASLt 1204")


def test_tensor_maps_are_what_the_driver_asks_for(tmp_path: Path, cuda: Cuda) -> None:
    program = program_of(cuda, tmp_path / "program", "tests/native/emulation/tensor_maps.cpp")
    assert run_with(None, program) == "tensor maps are right\n"


def fake_library(path: Path, code: str, *arguments: str) -> Path:
    """A shared object that has ``path``'s name for soname."""
    path.parent.mkdir(exist_ok=True)
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, "-x", "c", "-", "-x", "none"]
    subprocess.run([*command, *arguments], input=code, text=True, check=True)
    return path


def fake_cublaslt(path: Path, version: int) -> Path:
    return fake_library(
        path, f"unsigned long cublasLtGetVersion(void) {{ return {version}; }} void cublasLtMatmul(void) {{}}"
    )


def test_cublaslt_is_the_one_that_torch_uses(tmp_path: Path) -> None:
    program = program_of(
        find_cuda("newest"), tmp_path / "program", "tests/native/emulation/lt_library.cpp", LIBRARY_SOURCE
    )
    none = run_with(None, program)
    assert none.startswith("cuBLASLt is not there: torch has not loaded it, and neither libcublasLt.so.13 nor ")

    installed = fake_cublaslt(tmp_path / "installed" / "libcublasLt.so.13", 130000)
    assert run_with(installed.parent, program).splitlines() == [
        "version 130000",
        f"cuBLASLt: {installed} has no function cublasLtFrob; install the one that torch was released with",
    ]
    loaded = fake_cublaslt(tmp_path / "loaded" / "libcublasLt.so.12", 120400)
    assert "version 120400" in run_with(installed.parent, program, loaded)

    torchs = fake_cublaslt(tmp_path / "torch" / "libcublasLt.so.99", 990000)
    between = fake_library(tmp_path / "torch" / "libbetween.so", "", "-Wl,--no-as-needed", str(torchs))
    arguments = ("-Wl,--no-as-needed", str(between), f"-Wl,-rpath,{torchs.parent}")
    torch_cuda = fake_library(
        tmp_path / "torch" / "libtorch_cuda.so", "", *arguments, f"-Wl,-rpath-link,{torchs.parent}"
    )
    output = run_with(torchs.parent, program, loaded, installed, torch_cuda)
    assert output.splitlines() == [
        "version 990000",
        f"cuBLASLt: {torchs} has no function cublasLtFrob; install the one that torch was released with",
    ]
