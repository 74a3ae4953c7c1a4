"""What the compiled CUDA object holds, and what cuBLASLt thinks of our descriptions: no GPU is needed to see either."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

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
KERNELS += ("mma_gemm", "wgmma_gemm", "align_scales")
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
    match = re.search(r"mma_gemm_kernelILNS_5DTypeE(\d)ELS1_(\d)E", kernel)
    return (TYPES[match[1]], TYPES[match[2]]) if match else ()


@needs_object
@needs_cuobjdump
def test_no_kernel_spills() -> None:
    for (arch, kernel), usage in resources().items():
        allowed = 0
        if number(arch) >= 100:
            # Two registers at the limit of two blocks, and the rare way of rows that are read twice.
            allowed = (
                8 if "skinny_gemm_kernelIiLi8" in kernel else 32 if re.search("quantize_rows.*Li0E", kernel) else 0
            )
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
        if "skinny_gemm_kernel" in kernel:  # 256 threads: two blocks, but one of 8 rows of fp8
            assert usage["REG"] <= (255 if "IfLi8" in kernel else 128), (arch, kernel)
        elif own_types(kernel):
            is_int8, is_mma = "S8" in own_types(kernel), "wgmma" not in kernel
            # 256 threads: two blocks of mma, but one of fp8; 288 threads: one block of wgmma.
            assert usage["REG"] <= (128 if is_int8 and is_mma else 255 if is_mma else 224), (arch, kernel, usage)
        elif "norm_rows" in kernel or "activate_rows" in kernel or "quantize_rows" in kernel:  # up to 512 threads
            assert usage["REG"] <= 128, (arch, kernel)
        else:
            assert usage["REG"] <= 64, (arch, kernel)


@needs_object
@needs_cuobjdump
def test_machine_code_has_the_instructions_that_it_is_meant_to_have() -> None:
    for arch in architectures():
        for kernel, found in instructions(arch).items():
            if match := re.search(r"skinny_gemm_kernelI([if])Li(\d)ELi(\d)E", kernel):
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
                products = count(found, r"IMMA\.16832\.S8\.S8" if "S8" in types else r"QMMA\.16832.*|HMMA\.16816\.F32")
                is_there = "S8" in types or number(arch) >= 89
                assert products in ((32, 64) if is_there else (0,)), (arch, kernel)
                assert count(found, r"LDSM\.16\.M88\.4") == (12 if is_there else 0), (arch, kernel)
                assert count(found, r"LDGSTS.*\.128.*") == (12 if is_there else 0), (arch, kernel)


# --- libraries -------------------------------------------------------------------------------------------------------

LIBRARY = NVIDIA / "lib" / "libcublasLt.so.13"


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False) if nvcc else None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE) if dry_run else None
    return Path(top[1]).resolve() if top else None


def program_of(source: str, target: Path, cuda_home: Path, *more: str | Path) -> Path:
    """Compiles one of tests/native/emulation/*.cpp against the toolkit's headers."""
    torch_dir = Path(torch.__file__).parent
    command: list[str | Path] = ["c++", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    includes = (torch_dir / "include", cuda_home / "include", NVIDIA / "include")
    command += [f"-I{ROOT / 'csrc'}", *(part for path in includes for part in ("-isystem", path))]
    command += [
        ROOT / "tests" / "native" / "emulation" / source,
        "-o",
        target,
        f"-L{torch_dir / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run([*command, f"-Wl,-rpath,{torch_dir / 'lib'}", *more], check=True)
    return target


def needed_toolkit() -> Path:
    cuda_home = toolkit()
    if cuda_home is None or not (cuda_home / "include" / "cuda_runtime.h").is_file():
        pytest.skip("there is no CUDA toolkit to compile with")
    return cuda_home


@pytest.mark.skipif(not LIBRARY.is_file(), reason="cuBLASLt is not installed ('make cuda-headers' brings it)")
def test_cublaslt_accepts_every_description(tmp_path: Path) -> None:
    cuda_home = needed_toolkit()
    libraries = ("-l:libcublasLt.so.13", "-lcudart_static", "-ldl", "-lpthread", "-lrt")
    places = (f"-L{NVIDIA / 'lib'}", f"-L{cuda_home / 'lib64'}", f"-Wl,-rpath,{NVIDIA / 'lib'}")
    program = program_of("lt_descriptors.cpp", tmp_path / "lt_descriptors", cuda_home, *places, *libraries)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cuBLASLt 13")


def test_tensor_maps_are_what_the_driver_asks_for(tmp_path: Path) -> None:
    program = program_of("tensor_maps.cpp", tmp_path / "tensor_maps", needed_toolkit())
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "tensor maps are right\n"
