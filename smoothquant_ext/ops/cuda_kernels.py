"""Whether the CUDA kernels can run here and may: the GPU, its driver, torch, our library, and what was validated."""

from __future__ import annotations

import ctypes
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

FAMILIES = (
    "quantize",
    "norm_activation",
    "gemm_int8",
    "gemm_fp8",
    "gemm_mma",
    "gemm_wgmma",
    "experts_int8",
    "experts_fp8",
)
"""Kernels that are validated together, as csrc/cuda/devices.h names them."""

OLDEST_FP8 = 89
"""The oldest architecture whose tensor cores multiply fp8."""
OUTER_SCALES = 90
"""The architecture on which cuBLASLt multiplies fp8 sums by a scale a row and a column."""
WGMMA = 90
"""The architecture that has wgmma."""

OWN_GEMMS = ("mma", "wgmma")
"""Our own tensor-core products, each with a family of its own; csrc/kernels/gemm_config.h says what they take."""

_TABLE = Path(__file__).parents[1] / "validated_kernels.json"


class Validation(NamedTuple):
    """One run of the acceptance test that passed."""

    device: str
    arch: int
    kernels: tuple[str, ...]
    date: str
    commit: str
    evidence: str


def read_validations(path: Path = _TABLE) -> list[Validation]:
    """The table of what was validated.

    Raises:
        ValueError: for an entry that is incomplete or names unknown kernels.
    """
    entries: list[dict[str, Any]] = json.loads(path.read_text())["validated"]
    validations = []
    for entry in entries:
        if set(entry) != set(Validation._fields):
            raise ValueError(f"{path.name}: an entry has {sorted(entry)}, expected {sorted(Validation._fields)}")
        if unknown := set(entry["kernels"]) - set(FAMILIES):
            raise ValueError(f"{path.name}: there are no kernels {sorted(unknown)}, only {', '.join(FAMILIES)}")
        validations.append(Validation(**{**entry, "kernels": tuple(entry["kernels"])}))
    return validations


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
    """Why our library is not loaded, or nothing."""
    driver: int
    """The CUDA version that the driver is for, as 12040 for 12.4; 0 without a driver."""
    gpus: tuple[Gpu, ...]
    archs: str
    """The architectures that our library was built for, such as ``"80+PTX 90a"``."""


def driver_version() -> int:
    """The CUDA version that NVIDIA's driver is for, asked of the driver: torch's own question changes its name."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def is_enough(driver: int, torch_cuda: str) -> bool:
    """A driver serves every CUDA version of its own major number and of older ones."""
    return driver // 1000 >= int(torch_cuda.partition(".")[0])


def gather(library_error: str) -> Facts:
    """The facts of this machine and process."""
    if torch.version.cuda is None:
        return Facts(None, library_error, 0, (), "")
    driver = driver_version()
    gpus: tuple[Gpu, ...] = ()
    if is_enough(driver, torch.version.cuda):
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(found.name, 10 * found.major + found.minor) for found in properties)
    archs = "" if library_error else torch.ops.sq._cuda_archs()
    return Facts(torch.version.cuda, library_error, driver, gpus, archs)


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


_ON_CPU = "what is on the CPU runs there"


def why_not_at_all(facts: Facts) -> str:
    """Why no CUDA kernel of ours can run here, and what then happens; nothing if one can."""
    if facts.torch_cuda is None:
        return f"this torch is built without CUDA; {_ON_CPU}"
    if facts.library_error:
        return f"{facts.library_error}; {_ON_CPU}, and 8-bit layers on a GPU raise an error"
    if facts.driver == 0:
        return f"there is no NVIDIA driver; {_ON_CPU}"
    if not is_enough(facts.driver, facts.torch_cuda):
        version = f"{facts.driver // 1000}.{facts.driver % 1000 // 10}"
        return f"the NVIDIA driver is for CUDA {version}, and torch needs {facts.torch_cuda}: update it; {_ON_CPU}"
    if not facts.gpus:
        return f"the driver shows no GPU (is CUDA_VISIBLE_DEVICES set?); {_ON_CPU}"
    lacking = [gpu for gpu in facts.gpus if not has_code_for(facts.archs, gpu.arch)]
    if lacking:
        gpu = lacking[0]
        return f"{gpu.name} has compute capability {gpu.capability}, and the kernels are built for {facts.archs}"
    return ""


def requested_gemm() -> str:
    """The value of SMOOTHQUANT_CUDA_GEMM: ``library``, the default, or our kernels ``mma``, ``wgmma`` or ``auto``."""
    return os.environ.get("SMOOTHQUANT_CUDA_GEMM") or "library"


def own_gemms(gpu: Gpu, families: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``OWN_GEMMS`` that a GPU has the instructions for."""
    if "gemm_fp8" in families and gpu.arch < OLDEST_FP8:
        return ()
    return OWN_GEMMS if gpu.arch == WGMMA else OWN_GEMMS[:1]


class Choice(NamedTuple):
    """Whether an op runs our kernels, and why not better ones."""

    backend: str
    reason: str


def choose(facts: Facts, families: tuple[str, ...], validations: list[Validation]) -> Choice:
    """The backend and the reason of an op that needs these families of kernels, on the GPUs of this machine."""
    if reason := why_not_at_all(facts):
        return Choice("none", reason)
    multiplies = any(family.startswith("gemm") for family in families)
    request = requested_gemm() if multiplies else "library"
    if request not in ("library", "auto", *OWN_GEMMS):
        return Choice("none", f"SMOOTHQUANT_CUDA_GEMM is '{request}', expected library, mma, wgmma or auto")
    allowed = os.environ.get("SMOOTHQUANT_UNVALIDATED_CUDA") == "1"
    reasons = []
    for gpu in facts.gpus:
        own = own_gemms(gpu, families) if multiplies else ()
        needed = families
        if request == "library":
            reasons.append(_speed(gpu, families))
        elif chosen := [name for name in own if request in ("auto", name)]:
            reasons.append(f"SMOOTHQUANT_CUDA_GEMM={request}: our own tensor-core kernels")
            needed = (*(name for name in families if name[:4] != "gemm"), *(f"gemm_{name}" for name in chosen))
        else:
            return Choice("none", f"SMOOTHQUANT_CUDA_GEMM is {request}, which {gpu.name} has no instructions for")
        there = [entry for entry in validations if entry.arch == gpu.arch]
        missing = [family for family in needed if not any(family in entry.kernels for entry in there)]
        if missing:
            unvalidated = f"{' and '.join(missing)} not validated on compute capability {gpu.capability}"
            if not allowed:
                return Choice("none", f"{unvalidated}; SMOOTHQUANT_UNVALIDATED_CUDA=1 allows it")
            reasons.append(f"{unvalidated}; allowed by SMOOTHQUANT_UNVALIDATED_CUDA=1")
        else:
            used = [entry for entry in there if set(entry.kernels) & set(needed)]
            reasons += [f"validated on {entry.device}, {entry.date}, {entry.commit}" for entry in used]
        if own and request == "library":
            reasons.append(f"our own kernels are untimed: SMOOTHQUANT_CUDA_GEMM={' or '.join(own)} tries them")
    return Choice("cuda", "; ".join(dict.fromkeys(filter(None, reasons))))


def _speed(gpu: Gpu, families: tuple[str, ...]) -> str:
    """The reason why this GPU does not use the fastest kernels."""
    if "gemm_fp8" not in families or gpu.arch == OUTER_SCALES:
        return ""
    if gpu.arch < OLDEST_FP8:
        return f"{gpu.name} has no fp8 tensor cores: values are widened to bf16 and multiplied at its speed"
    return f"cuBLASLt takes no scales per row on {gpu.name}: they are another pass over the result"
