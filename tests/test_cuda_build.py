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

ROOT = Path(__file__).resolve().parent.parent
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


@needs_object
@needs_cuobjdump
def test_every_kernel_is_there_for_every_architecture() -> None:
    for arch in architectures():
        mangled = [kernel for own, kernel in resources() if own == arch]
        for name in KERNELS:
            assert any(f"{name}_kernel" in kernel for kernel in mangled), (arch, name)


@needs_object
@needs_cuobjdump
def test_no_kernel_spills() -> None:
    for (arch, kernel), usage in resources().items():
        allowed = 0
        if int(re.sub(r"\D", "", arch)) >= 100:
            # Two registers at the limit of two blocks, and the rare way of rows that are read twice.
            allowed = (
                8 if "skinny_gemm_kernelIiLi8" in kernel else 32 if re.search("quantize_rows.*Li0E", kernel) else 0
            )
        assert usage["STACK"] <= allowed, (arch, kernel, usage)
        assert usage["LOCAL"] == 0, (arch, kernel, usage)


@needs_object
@needs_cuobjdump
def test_registers_leave_room_for_the_blocks_that_are_meant_to_run_together() -> None:
    for (arch, kernel), usage in resources().items():
        if "skinny_gemm_kernel" in kernel:  # 256 threads: two blocks, but one of 8 rows of fp8
            assert usage["REG"] <= (255 if "IfLi8" in kernel else 128), (arch, kernel)
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
        has_fp8 = int(re.sub(r"\D", "", arch)) >= 89
        for kernel, found in instructions(arch).items():
            if "quantize_rows" in kernel:
                assert bool(count(found, r"F2FP\.(SATFINITE\.)?E[45]M[32].*")) == has_fp8, (arch, kernel)


# --- cuBLASLt -------------------------------------------------------------------------------------------------------

LIBRARY = NVIDIA / "lib" / "libcublasLt.so.13"


def toolkit() -> Path | None:
    nvcc = shutil.which("nvcc")
    dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False) if nvcc else None
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE) if dry_run else None
    return Path(top[1]).resolve() if top else None


@pytest.mark.skipif(not LIBRARY.is_file(), reason="cuBLASLt is not installed ('make cuda-headers' brings it)")
def test_cublaslt_accepts_every_description(tmp_path: Path) -> None:
    cuda_home = toolkit()
    if cuda_home is None or not (cuda_home / "include" / "cuda_runtime.h").is_file():
        pytest.skip("there is no CUDA toolkit to compile with")
    torch_dir = Path(torch.__file__).parent
    includes = (torch_dir / "include", cuda_home / "include", NVIDIA / "include")
    folders = (torch_dir / "lib", NVIDIA / "lib")
    program = tmp_path / "lt_descriptors"
    command: list[str | Path] = ["c++", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{ROOT / 'csrc'}", *(part for path in includes for part in ("-isystem", path))]
    command += [ROOT / "tests" / "cuda" / "lt_descriptors.cpp", "-o", program]
    command += [f"-L{path}" for path in (*folders, cuda_home / "lib64")]
    command += ["-ltorch_cpu", "-lc10", "-l:libcublasLt.so.13", "-lcudart_static", "-ldl", "-lpthread", "-lrt"]
    command += [f"-Wl,-rpath,{path}" for path in folders]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cuBLASLt 13")
