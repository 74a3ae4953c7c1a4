"""Compiles smoothquant_ext/_C.so (schemas and CPU kernels) and, where CUDA is found, smoothquant_ext/_C_cuda.so.

Both are loaded with torch.ops.load_library, use only torch's stable ABI and no Python.h: one wheel, tagged py3-none,
loads in every torch >= 2.11 and every Python >= 3.10, whichever were here at build time. Environment:

    SMOOTHQUANT_CUDA            auto (default): build _C_cuda.so where CUDA is found; 1: fail where it is not; 0: do not
    SMOOTHQUANT_CUDA_ARCHS      list for nvcc, default "80+PTX 89 90a 100a 120"
    SMOOTHQUANT_CUBLAS_INCLUDE  folder of cublasLt.h, where neither the toolkit nor the nvidia-cublas wheel has it
    CUDA_HOME, CUDA_PATH        the CUDA toolkit, where the nvcc on PATH is not the one to use
    MAX_JOBS                    how many files to compile at a time
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    sys.exit("smoothquant-ext: building needs setuptools >= 77; run 'pip install -U setuptools', then build again.")

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
BUILD_TEMP = Path("build", "temp")
OLDEST_TORCH = (2, 11)
CUDA_EXTENSION = "smoothquant_ext._C_cuda"
CUDA_MAJOR = 13  # libcublasLt's soname carries it, so that it is fixed for the whole wheel
DEFAULT_CUDA_ARCHS = "80+PTX 89 90a 100a 120"


def fail(sentence: str) -> NoReturn:
    sys.exit(f"smoothquant-ext: {sentence}")


def require_torch() -> None:
    try:
        from torch import __version__ as version
    except ImportError as error:
        fail(f"compiling needs torch >= 2.11 here ({error}); run 'pip install torch' first, then build again.")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        fail(f"compiling needs torch >= 2.11, found {version}; run 'pip install -U torch' first, then build again.")


require_torch()

# ninja may be in an environment that is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

TORCH_DIR = Path(torch.__file__).parent


def read_flags(*groups: str) -> list[str]:
    """The flags of these groups in csrc/flags.txt, which CMakeLists.txt reads too."""
    lines = (ROOT / CSRC / "flags.txt").read_text().splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [flag for group, flag in pairs if group in groups]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / CSRC).glob(pattern))


def headers() -> list[str]:
    return sources("**/*.h", "**/*.cuh", "flags.txt")


def cpu_extension() -> Extension:
    return Extension(
        "smoothquant_ext._C",
        sources("*.cpp", "cpu/**/*.cpp"),
        depends=headers(),
        include_dirs=[str(ROOT / CSRC)],
        library_dirs=[str(TORCH_DIR / "lib")],
        libraries=["torch_cpu"],
        extra_compile_args=[*read_flags("cxx", "torch"), "-isystem", str(TORCH_DIR / "include")],
        # -z defs: a symbol that the stable ABI does not have is found out here and not at the user's.
        extra_link_args=["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,--strip-debug"],
        language="c++",
    )


# --- CUDA: what is needed, and where it is -------------------------------------------------------------------------


class CudaNotFound(Exception):
    """Its message says what is missing."""


def find_cuda_home() -> Path:
    """The toolkit's folder: what CUDA_HOME or CUDA_PATH say, or what the nvcc on PATH says of itself.

    nvcc is asked because it may be a wrapper script that lies elsewhere, which misleads a guess from its path.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            if not Path(home, "bin", "nvcc").is_file():
                raise CudaNotFound(f"{variable}={home} has no bin/nvcc")
            return Path(home)
    if not shutil.which("nvcc"):
        raise CudaNotFound("there is no nvcc on PATH and CUDA_HOME is not set")
    dry_run = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if not top:
        raise CudaNotFound("'nvcc --dryrun x.cu' does not say where the toolkit is; set CUDA_HOME")
    return Path(top[1]).resolve()


def check_nvcc_version(cuda_home: Path) -> None:
    text = subprocess.run([cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if not release or int(release[1]) != CUDA_MAJOR:
        found = f"{release[1]}.{release[2]}" if release else "of an unknown version"
        raise CudaNotFound(f"the nvcc in {cuda_home} is {found}, and {CUDA_MAJOR}.x is needed")


def find_cublaslt_include(cuda_home: Path) -> Path:
    site_packages = Path(sysconfig.get_path("purelib"))
    places = [cuda_home / "include", site_packages / "nvidia" / f"cu{CUDA_MAJOR}" / "include"]
    if chosen := os.environ.get("SMOOTHQUANT_CUBLAS_INCLUDE"):
        places = [Path(chosen)]
    for place in places:
        if (place / "cublasLt.h").is_file():
            return place
    looked = " or ".join(map(str, places))
    raise CudaNotFound(f"cublasLt.h is not in {looked}; 'pip install nvidia-cublas' brings it")


def cuda_archs() -> list[str]:
    """SMOOTHQUANT_CUDA_ARCHS, each as "90a", which is code for that one, or "80+PTX": PTX too, for all newer ones."""
    archs = os.environ.get("SMOOTHQUANT_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
    plain = []
    for item in re.split(r"[\s;,]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item)
        if not match:
            fail(f"SMOOTHQUANT_CUDA_ARCHS has '{item}', expected a list such as '{DEFAULT_CUDA_ARCHS}'.")
        plain.append("".join(match.groups(default="")))
    return plain


def gencode_flag(arch: str) -> str:
    number, _, ptx = arch.partition("+")
    code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def cuda_extension() -> Extension:
    cuda_home = find_cuda_home()
    check_nvcc_version(cuda_home)
    cublaslt_include = find_cublaslt_include(cuda_home)
    archs = cuda_archs()
    # On a CPU build of torch this is None whatever the environment says.
    cpp_extension.CUDA_HOME = str(cuda_home)
    # -isystem: newer cuBLAS headers given with -I would take the place of the toolkit's own.
    include = ["-isystem", str(cuda_home / "include"), "-isystem", str(cublaslt_include)]
    torch_include = ["-isystem", str(TORCH_DIR / "include")]
    return Extension(
        CUDA_EXTENSION,
        sources("cuda/**/*.cpp", "cuda/**/*.cu"),
        depends=headers(),
        include_dirs=[str(ROOT / CSRC)],
        # The object says itself what it was built for, see devices.cpp.
        define_macros=[("SQ_CUDA_ARCHS", f'"{" ".join(archs)}"')],
        library_dirs=[str(TORCH_DIR / "lib"), str(cuda_home / "lib64")],
        libraries=["torch_cpu", "cudart_static", "rt", "pthread", "dl"],
        extra_compile_args={
            # USE_CUDA declares the CUDA part of the stable ABI.
            "cxx": [*read_flags("cxx", "torch"), "-DUSE_CUDA", *torch_include, *include],
            "nvcc": [*read_flags("nvcc"), *include, *map(gencode_flag, archs)],
        },
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--strip-debug", *stub_link_args()],
        language="c++",
    )


STUBS = ("libtorch_cuda.so", f"libcublasLt.so.{CUDA_MAJOR}")


def stub_link_args() -> list[str]:
    """Records DT_NEEDED entries for libraries that need not be here: at load time they are those that torch loaded."""
    return [f"-L{BUILD_TEMP / 'stubs'}", "-Wl,--no-as-needed", *(f"-l:{soname}" for soname in STUBS), "-Wl,--as-needed"]


def make_stubs() -> None:
    """Shared objects with nothing in them but the soname, which is all that a linker wants of them."""
    folder = ROOT / BUILD_TEMP / "stubs"
    folder.mkdir(parents=True, exist_ok=True)
    for soname in STUBS:
        command = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-x", "c", os.devnull, "-o", str(folder / soname)]
        subprocess.run([*os.environ.get("CC", "gcc").split(), *command], check=True)


def drop_stale_cuda_objects() -> None:
    """Removes what nvcc made from older headers: torch tells ninja about those of CUDA sources only if it has CUDA."""
    newest = max((ROOT / header).stat().st_mtime for header in headers())
    for built in (ROOT / BUILD_TEMP / CSRC / "cuda" / "kernels").glob("*.o"):
        if built.stat().st_mtime < newest:
            built.unlink()


def extensions() -> list[Extension]:
    wanted = os.environ.get("SMOOTHQUANT_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        fail(f"SMOOTHQUANT_CUDA is '{wanted}', expected 0, 1 or auto.")
    built = [cpu_extension()]
    reason = "SMOOTHQUANT_CUDA=0"
    if wanted != "0":
        try:
            return [*built, cuda_extension()]
        except CudaNotFound as missing:
            if wanted == "1":
                fail(f"SMOOTHQUANT_CUDA=1, but {missing}.")
            reason = str(missing)
    print(f"smoothquant-ext: building without CUDA kernels: {reason}.", file=sys.stderr)
    return built


class BuildExtension(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
    def finalize_options(self) -> None:
        super().finalize_options()
        # pip compiles in a throwaway folder; a fixed one lets ninja compile again only what changed.
        self.build_temp = str(BUILD_TEMP)

    def build_extensions(self) -> None:
        make_stubs()
        drop_stale_cuda_objects()
        if not any(extension.name == CUDA_EXTENSION for extension in self.extensions):
            # One left by an earlier build would be packed, or loaded, beside a newer _C.so.
            Path(self.get_ext_fullpath(CUDA_EXTENSION)).unlink(missing_ok=True)
        super().build_extensions()


class BdistWheel(bdist_wheel):
    """Tags the wheel for any Python, because no Python symbol is used, and for this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension, "bdist_wheel": BdistWheel})
