"""Whether CUDA kernels can run here: the GPUs, their driver, torch, and the compiled library."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .. import library


class Gpu(NamedTuple):
    """A device of this machine; ``arch`` is 90 for compute capability 9.0."""

    name: str
    arch: int

    @property
    def capability(self) -> str:
        return f"{self.arch // 10}.{self.arch % 10}"


class Facts(NamedTuple):
    """The facts of this machine that decide whether CUDA kernels can run."""

    torch_cuda: str | None
    """The CUDA version that torch was built with."""
    library_error: str
    """Why our library is missing or cannot be loaded, or nothing."""
    driver: int
    """The CUDA version that the driver is for, as 12040 for 12.4; 0 without a driver."""
    gpus: tuple[Gpu, ...]
    archs: str
    """The architectures that our library was built for, such as ``"80+PTX 90a"``; empty if that is not known."""
    nvcc: str = ""
    """The version of the nvcc that compiled our library, likewise."""


def driver_version() -> int:
    """The CUDA version that NVIDIA's driver is for, asked of the driver: torch's own question changes its name."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def driver_release() -> str:
    """The release of NVIDIA's kernel driver, such as "580.65.06"; empty where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else ""


def is_enough(driver: int, torch_cuda: str) -> bool:
    """A driver serves every CUDA version of its own major number and of older ones."""
    return driver // 1000 >= int(torch_cuda.partition(".")[0])


def gather(library_error: str = "") -> Facts:
    """The facts of this machine and process.

    Args:
        library_error: why our library could not be loaded, where that was tried.
    """
    if torch.version.cuda is None:
        return Facts(None, "", 0, (), "")
    built = library.built()
    driver = driver_version()
    gpus: tuple[Gpu, ...] = ()
    if is_enough(driver, torch.version.cuda):
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(found.name, 10 * found.major + found.minor) for found in properties)
    return Facts(torch.version.cuda, library_error or built.why_missing, driver, gpus, built.archs, built.nvcc)


def has_code_for(archs: str, arch: int) -> bool:
    """Whether a library built for ``archs`` runs on an architecture.

    Machine code runs on its own major version from its minor version on, with an "a" on that one architecture only,
    with an "f" as without; PTX is compiled by the driver for everything newer.
    """
    for number, feature, ptx in re.findall(r"(\d+)([af]?)(\+PTX)?", archs):
        built = int(number)
        if arch == built or (feature != "a" and arch // 10 == built // 10 and arch >= built):
            return True
        if ptx and not feature and arch >= built:
            return True
    return False


def _version(facts: Facts) -> str:
    return f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"


def why_no_gpu(facts: Facts) -> str:
    """Why nothing can run on a GPU here; empty if there is one."""
    if facts.torch_cuda is None:
        return "this torch is built without CUDA"
    if facts.driver == 0:
        return "there is no NVIDIA driver"
    if not is_enough(facts.driver, facts.torch_cuda):
        return f"the NVIDIA driver is for CUDA {_version(facts)}, and torch needs {facts.torch_cuda}: update it"
    return "" if facts.gpus else "the driver shows no GPU (is CUDA_VISIBLE_DEVICES set?)"


def why_no_kernels(facts: Facts) -> str:
    """Why our CUDA kernels cannot run on the GPUs of this machine; empty if they can."""
    if facts.library_error:
        return facts.library_error
    if facts.nvcc and not is_enough(facts.driver, facts.nvcc):
        return (
            f"the NVIDIA driver is for CUDA {_version(facts)}, and the kernels were compiled by nvcc {facts.nvcc}: "
            "update the driver, or compile with an older nvcc"
        )
    lacking = [gpu for gpu in facts.gpus if not has_code_for(facts.archs, gpu.arch)]
    if not lacking or not facts.archs:
        return ""
    gpu = lacking[0]
    return f"{gpu.name} has compute capability {gpu.capability}, and the kernels are built for {facts.archs}"
