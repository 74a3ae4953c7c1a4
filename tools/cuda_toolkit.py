"""Which CUDA toolkit compiles the kernels and for which GPUs, or one sentence that says why none does. For setup.py.

Nothing here needs torch or changes anything; everything that is asked of nvcc takes milliseconds.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

OLDEST_NVCC = (12, 4)
DEFAULT_ARCHS = "80 89+PTX 90a 100a 120"
"""What is newer than 8.9 and has no code of its own runs the PTX of 8.9, which has fp8."""

DRY_RUN = ("--dryrun", "-x", "cu", os.devnull)
PATIENCE_S = 60  # nvcc answers at once, or never

# By the toolkit's major version: what brings cublasLt.h, and where to. From 13 on the folder has the version's name.
CUBLAS_WHEELS = {12: ("nvidia-cublas-cu12", "nvidia/cublas/include"), 13: ("nvidia-cublas", "nvidia/cu13/include")}
SYSTEM_INCLUDE = Path("/usr/include")  # of distributions' own packages; compilers look there without being told


class CudaNotFound(Exception):
    """Its message says what is missing, as the end of a sentence."""


class Toolkit(NamedTuple):
    """A toolkit that can compile the kernels."""

    home: Path
    version: str
    """Of nvcc, such as ``"12.4"``."""
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]
    flags: tuple[str, ...]
    """Those of the optional flags that this nvcc takes."""
    archs: tuple[str, ...]
    """Such as ``("80", "89+PTX", "90a")``."""
    remarks: tuple[str, ...]
    """What a user should know, each the end of a sentence."""

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


class Record(NamedTuple):
    """What was built, for those who cannot see the build's output: ``smoothquant_ext/_build.json``."""

    cuda: bool
    archs: str
    """As ``SMOOTHQUANT_CUDA_ARCHS``; empty without CUDA."""
    nvcc: str
    """Its version; empty without CUDA."""
    sentence: str

    def write(self, package: Path) -> None:
        package.mkdir(parents=True, exist_ok=True)
        (package / RECORD_NAME).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")


RECORD_NAME = "_build.json"


def record_of(toolkit: Toolkit) -> Record:
    archs = " ".join(toolkit.archs)
    sentence = "; ".join([f"CUDA kernels for {archs}, compiled by nvcc {toolkit.version}", *toolkit.remarks])
    return Record(True, archs, toolkit.version, f"{sentence}.")


def record_without_cuda(reason: str) -> Record:
    return Record(False, "", "", f"built without CUDA kernels: {reason}.")


# --- nvcc -----------------------------------------------------------------------------------------------------------


def ask(nvcc: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [nvcc, *arguments], capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE_S
        )
    except OSError as error:
        raise CudaNotFound(f"{nvcc} does not start: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise CudaNotFound(f"'{nvcc} {' '.join(arguments)}' has not answered for {PATIENCE_S} s") from error


def find_home(environment: Mapping[str, str]) -> Path:
    """The toolkit's folder: what CUDA_HOME or CUDA_PATH say, or what the nvcc on PATH says of itself.

    nvcc is asked because it may be a wrapper script that lies elsewhere, which misleads a guess from its path.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environment.get(variable):
            if not Path(home, "bin", "nvcc").is_file():
                raise CudaNotFound(f"{variable}={home} has no bin/nvcc")
            return Path(home)
    nvcc = shutil.which("nvcc", path=environment.get("PATH", ""))
    if nvcc is None:
        raise CudaNotFound("there is no nvcc on PATH and CUDA_HOME is not set")
    top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, *DRY_RUN).stderr, re.MULTILINE)
    if not top:
        raise CudaNotFound(f"'{nvcc} {' '.join(DRY_RUN)}' does not say where the toolkit is; set CUDA_HOME")
    return Path(top[1]).resolve()


def nvcc_version(nvcc: Path) -> str:
    answer = ask(nvcc, "--version")
    release = re.search(r"release (\d+)\.(\d+)", answer.stdout)
    if answer.returncode or not release:
        raise CudaNotFound(f"'{nvcc} --version' fails: {first_error(answer.stdout + answer.stderr)}")
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        raise CudaNotFound(f"{nvcc} is {release[1]}.{release[2]}, and {oldest} or newer is needed")
    return f"{release[1]}.{release[2]}"


def takes(nvcc: Path, *flags: str) -> bool:
    """Whether nvcc would compile with these flags: a dry run checks them."""
    return ask(nvcc, *flags, *DRY_RUN).returncode == 0


# --- architectures --------------------------------------------------------------------------------------------------


def parse_archs(text: str) -> tuple[str, ...]:
    """A list of architectures: "90a" is code for that one, "80+PTX" brings PTX too, for all newer ones.

    Raises:
        ValueError: if it is not such a list; the message is a sentence.
    """
    plain = []
    for item in re.split(r"[\s;,]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise ValueError(f"SMOOTHQUANT_CUDA_ARCHS has '{item}', expected a list such as '{DEFAULT_ARCHS}'.")
        plain.append("".join(match.groups(default="")))
    return tuple(plain)


def gencode_flag(arch: str) -> str:
    number, _, ptx = arch.partition("+")
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def known_archs(nvcc: Path, version: str, wanted: str | None) -> tuple[tuple[str, ...], list[str]]:
    """The architectures to compile for, and those of the default that this nvcc does not know."""
    archs = parse_archs(wanted or DEFAULT_ARCHS)
    unknown = [arch for arch in archs if not takes(nvcc, gencode_flag(arch))]
    if wanted and unknown:
        raise CudaNotFound(f"nvcc {version} does not know {' '.join(unknown)} of SMOOTHQUANT_CUDA_ARCHS")
    if len(unknown) == len(archs):
        raise CudaNotFound(f"nvcc {version} does not know one of the architectures {DEFAULT_ARCHS}")
    return tuple(arch for arch in archs if arch not in unknown), unknown


# --- the whole ------------------------------------------------------------------------------------------------------


def find_cublaslt_include(includes: Sequence[Path], major: int, sites: Sequence[Path], chosen: str | None) -> Path:
    """The folder of cublasLt.h. One of another major version will do: its functions are looked up at run time."""
    package, own = CUBLAS_WHEELS.get(major, ("nvidia-cublas", f"nvidia/cu{major}/include"))
    in_wheels = dict.fromkeys([own, *(folder for _, folder in CUBLAS_WHEELS.values())])
    places = [*includes, *(site / folder for folder in in_wheels for site in sites), SYSTEM_INCLUDE]
    if chosen:
        places = [Path(chosen)]
    for place in places:
        if (place / "cublasLt.h").is_file():
            return place
    where = f"not in {chosen}" if chosen else "neither in the toolkit nor beside torch"
    raise CudaNotFound(f"cublasLt.h is {where}; 'pip install {package}' brings it")


def folders(candidates: Iterable[Path]) -> list[Path]:
    """Those that are there, each once: many of a toolkit are links to others."""
    return list(dict.fromkeys(folder.resolve() for folder in candidates if folder.is_dir()))


def find_toolkit(
    environment: Mapping[str, str], torch_cuda: str | None, sites: Sequence[Path], optional_flags: Sequence[str] = ()
) -> Toolkit:
    """The toolkit that the environment names, if it can compile the kernels.

    Args:
        environment: CUDA_HOME, CUDA_PATH, PATH, SMOOTHQUANT_CUDA_ARCHS and SMOOTHQUANT_CUBLAS_INCLUDE are read.
        torch_cuda: the CUDA version that torch was built with, if any.
        sites: folders of installed packages, where NVIDIA's wheels may be.
        optional_flags: flags to use if nvcc takes them.

    Raises:
        CudaNotFound: if there is none.
        ValueError: if SMOOTHQUANT_CUDA_ARCHS is not a list of architectures.
    """
    home = find_home(environment)
    nvcc = home / "bin" / "nvcc"
    version = nvcc_version(nvcc)
    major = int(version.partition(".")[0])
    target = home / "targets" / f"{platform.machine()}-linux"
    includes = folders(folder / name for folder in (home, target) for name in ("include", "include/cccl"))
    cublaslt = find_cublaslt_include(includes, major, sites, environment.get("SMOOTHQUANT_CUBLAS_INCLUDE"))
    # Last, because cuBLAS's wheel may bring newer headers of other libraries too.
    includes = [folder for folder in folders([*includes, cublaslt]) if folder != SYSTEM_INCLUDE]
    archs, unknown = known_archs(nvcc, version, environment.get("SMOOTHQUANT_CUDA_ARCHS"))
    remarks = []
    if unknown:
        remarks.append(f"this nvcc does not know {' '.join(unknown)}, such GPUs compile PTX when they first run it")
    if torch_cuda is not None and major > int(torch_cuda.partition(".")[0]):
        remarks.append(f"they need a driver for CUDA {major}, although this torch, for CUDA {torch_cuda}, does not")
    return Toolkit(
        home,
        version,
        tuple(includes),
        tuple(folders([home / "lib64", home / "lib", target / "lib"])),
        tuple(flag for flag in optional_flags if takes(nvcc, flag)),
        archs,
        tuple(remarks),
    )


# --- compilers that fail ----------------------------------------------------------------------------------------------

_REASON = re.compile(
    r"\b(error|fatal|died due to signal|segmentation fault|killed|cannot find|undefined reference)\b", re.IGNORECASE
)
_NO_MESSAGE = re.compile(r"\[\d+/\d+\]|FAILED:|ninja:|\S*[^:\s]\s+-\S")  # the last: a command and its first option


def first_error(output: str) -> str:
    """The line of a compiler's output that says what is wrong, or else the last one."""
    lines = [line.strip() for line in output.splitlines()]
    messages = [line for line in lines if line and not _NO_MESSAGE.match(line)]
    reasons = [line for line in messages if _REASON.search(line)]
    return (reasons or messages[-1:] or ["without a word"])[0].rstrip(".")


def why_not_compiled(output: str, toolkit: Toolkit, sources: Sequence[str]) -> str:
    """The end of the sentence for a build that failed: which of the sources, and what the compiler says first."""
    output = output.replace(f"{Path.cwd()}/", "")
    failed = re.search(r"^FAILED: .*?(\S+)\.o\b", output, re.MULTILINE)
    source = next((name for name in sources if failed and failed[1].endswith(name.rpartition(".")[0])), None)
    what = f"{source} does not compile with nvcc {toolkit.version}" if source else "the CUDA object does not link"
    return f"{what}: {first_error(output)}"


@contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """Copies to a file what this process and its children print in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    tee: Any = subprocess.Popen(["tee", path], stdin=subprocess.PIPE, stdout=saved[0])
    for descriptor in (1, 2):
        os.dup2(tee.stdin.fileno(), descriptor)
    tee.stdin.close()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        tee.wait()
