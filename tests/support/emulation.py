"""Builds the CUDA library for the CPU: see tests/native/emulation/emulate.h."""

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
    *(f"csrc/cuda/ops/{name}.cpp" for name in ("quantize", "norm_activation", "gemm", "linear", "decoder_layer")),
    *(f"csrc/cuda/compute/{name}.cpp" for name in ("product", "quantize", "tile_product", "decoder_attention")),
    *(f"csrc/cuda/kernels/{name}.cu" for name in ("quantize", "norm", "activate", "gemm", "decoder_layer", "mma", "wgmma")),
    "tests/native/emulation/emulated_device.cpp",
]


def emulated_library() -> Path:
    """The library, compiled with the project's own flags; products in pieces of 256 rows.

    It stays in build/emulation/ until a source changes: compiling takes as long as all the tests here. Test processes
    that want it at the same time wait for the first.
    """
    torch_dir = Path(torch.__file__).parent
    lines = (ROOT / "csrc" / "flags.txt").read_text().splitlines()
    flags = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("cxx", "torch"))]
    flags += ["-O1", "-fPIC", "-DUSE_CUDA", "-DSQ_MOST_SUM_BYTES=1", "-include", "tests/native/emulation/emulate.h"]
    flags += ["-Itests/native/emulation/stub", "-Itests", "-Icsrc", "-isystem", str(torch_dir / "include")]
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{state_of_the_sources(flags)}.so"

    def compile_one(source: str) -> str:
        target = str(folder / f"{source.replace('/', '-')}.o")
        subprocess.run(["c++", "-x", "c++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, SOURCES))
            whole = folder / "whole.so"
            libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
            subprocess.run(["c++", "-shared", *objects, "-o", whole, *libraries], check=True)
            for older in folder.glob("*.so"):
                older.rename(library) if older == whole else older.unlink()
    return library


def state_of_the_sources(flags: list[str]) -> str:
    """A hash of what the library is made of: sources, flags, compiler and torch."""
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    state = hashlib.sha256(f"{SOURCES} {flags} {compiler} {torch.__version__}".encode())
    for folder in ("csrc/common", "csrc/cuda", "tests/native"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            state.update(path.read_bytes() if path.is_file() else b"")
    return state.hexdigest()[:16]
