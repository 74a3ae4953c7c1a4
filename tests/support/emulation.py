"""Builds the CUDA library for the CPU, and a CUDA device for torch: see tests/native/emulation/."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(f"csrc/cuda/ops/{name}.cpp" for name in ("quantize", "norm_activation", "gemm", "linear", "setup")),
    *(f"csrc/cuda/ops/{name}.cpp" for name in ("decoder_layer", "experts")),
    *(f"csrc/cuda/compute/{name}.cpp" for name in ("product", "quantize", "ways", "context")),
    *(f"csrc/cuda/compute/{name}.cpp" for name in ("decoder_attention", "experts")),
    *(f"csrc/cuda/compute/{name}_product.cpp" for name in ("library", "tile", "torch")),
    *(f"csrc/cuda/kernels/{name}.cu" for name in ("quantize", "norm", "activate", "gemm", "decoder_layer")),
    *(f"csrc/cuda/kernels/{name}.cu" for name in ("mma", "wgmma", "grouped", "grouped_mma")),
    *(f"tests/native/emulation/emulated_{name}.cpp" for name in ("device", "runtime")),
]


def emulated_library() -> Path:
    """The CUDA library, compiled with the project's own flags; products in pieces of 256 rows."""
    lines = (ROOT / "csrc" / "flags.txt").read_text().splitlines()
    flags = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("cxx", "torch"))]
    flags += ["-O1", "-fPIC", "-DUSE_CUDA", "-DSQ_MOST_SUM_BYTES=1", "-include", "tests/native/emulation/emulate.h"]
    flags += ["-Itests/native/emulation/stub", "-Itests", "-Icsrc"]
    return built("ops", SOURCES, flags, ("csrc/common", "csrc/cuda", "tests/native"))


def torch_device() -> Path:
    """A library that gives torch a CUDA device whose memory is the host's; it is C++ of torch itself."""
    source = "tests/native/emulation/torch_device.cpp"
    return built("device", [source], ["-std=c++20", "-O1", "-fPIC"], (source,))


def built(name: str, sources: list[str], flags: list[str], inputs: tuple[str, ...]) -> Path:
    """A shared library.

    It stays in build/emulation/ until an input changes: compiling takes as long as all the tests that use it. Test
    processes that want it at the same time wait for the first.
    """
    torch_dir = Path(torch.__file__).parent
    flags = [*flags, "-isystem", str(torch_dir / "include")]
    folder = ROOT / "build" / "emulation" / name
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{state_of(inputs, sources, flags)}.so"

    def compile_one(source: str) -> str:
        target = str(folder / f"{source.replace('/', '-')}.o")
        subprocess.run(["c++", "-x", "c++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, sources))
            whole = folder / "whole.so"
            libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
            subprocess.run(["c++", "-shared", *objects, "-o", whole, *libraries], check=True)
            for older in folder.glob("*.so"):
                older.rename(library) if older == whole else older.unlink()
    return library


def state_of(inputs: tuple[str, ...], sources: list[str], flags: list[str]) -> str:
    """A hash of what a library is made of: sources, what they include, flags, compiler and torch."""
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(f"{sources} {flags} {compiler} {torch.__version__}".encode())
    for each in inputs:
        path = ROOT / each
        for file in [path] if path.is_file() else sorted(path.rglob("*.*")):
            state.update(file.read_bytes() if file.is_file() else b"")
    return state.hexdigest()[:16]
