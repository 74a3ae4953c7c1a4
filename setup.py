"""Compiles smoothquant_ext/_C.so (schemas and CPU kernels) and, where CUDA is found, smoothquant_ext/_C_cuda.so.

Both are loaded with torch.ops.load_library, use only torch's stable ABI and no Python.h: one wheel, tagged py3-none,
loads in every torch >= 2.11 and every Python >= 3.10, whichever were here at build time. Environment:

    SMOOTHQUANT_CUDA            auto (default): build _C_cuda.so where that works; 1: fail where it does not; 0: do not
    SMOOTHQUANT_CUDA_ARCHS      list for nvcc, by default those of tools/cuda_toolkit.py that it knows
    SMOOTHQUANT_CUBLAS_INCLUDE  folder of cublasLt.h, where neither the toolkit nor the nvidia-cublas wheel has it
    CUDA_HOME, CUDA_PATH        the CUDA toolkit, where the nvcc on PATH is not the one to use
    MAX_JOBS                    how many files to compile at a time

What was built, or why no _C_cuda.so, stands in smoothquant_ext/_build.json: pip hides what is printed here.
"""

from __future__ import annotations

import os
import re
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
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402
from cuda_toolkit import CudaNotFound, Record, Toolkit  # noqa: E402

CSRC = Path("csrc")
BUILD_TEMP = Path("build", "temp")
OLDEST_TORCH = (2, 11)
PACKAGE = "smoothquant_ext"
CUDA_EXTENSION = "smoothquant_ext._C_cuda"


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


def cuda_extension(toolkit: Toolkit) -> Extension:
    # On a CPU build of torch this is None whatever the environment says.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    # -isystem: newer cuBLAS headers given with -I would take the place of the toolkit's own.
    include = [part for folder in toolkit.includes for part in ("-isystem", str(folder))]
    torch_include = ["-isystem", str(TORCH_DIR / "include")]
    return Extension(
        CUDA_EXTENSION,
        sources("cuda/**/*.cpp", "cuda/**/*.cu"),
        depends=headers(),
        include_dirs=[str(ROOT / CSRC)],
        # The object says itself what it was built for, see devices.cpp.
        define_macros=[("SQ_CUDA_ARCHS", f'"{" ".join(toolkit.archs)}"')],
        library_dirs=[str(TORCH_DIR / "lib"), *map(str, toolkit.libraries)],
        libraries=["torch_cpu", "cudart_static", "rt", "pthread", "dl"],
        extra_compile_args={
            # USE_CUDA declares the CUDA part of the stable ABI.
            "cxx": [*read_flags("cxx", "torch"), "-DUSE_CUDA", *torch_include, *include],
            "nvcc": [*read_flags("nvcc"), *toolkit.flags, *include, *map(cuda_toolkit.gencode_flag, toolkit.archs)],
        },
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--strip-debug", *stub_link_args()],
        language="c++",
    )


STUB = "libtorch_cuda.so"


def stub_link_args() -> list[str]:
    """Records a DT_NEEDED entry for a library that need not be here: at load time it is the one that torch loaded."""
    return [f"-L{BUILD_TEMP / 'stubs'}", "-Wl,--no-as-needed", f"-l:{STUB}", "-Wl,--as-needed"]


def make_stub() -> None:
    """A shared object with nothing in it but the soname, which is all that a linker wants of it."""
    folder = BUILD_TEMP / "stubs"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["-shared", "-nostdlib", f"-Wl,-soname,{STUB}", "-x", "c", os.devnull, "-o", str(folder / STUB)]
    subprocess.run([*os.environ.get("CC", "gcc").split(), *command], check=True)


def drop_stale_cuda_objects() -> None:
    """Removes what nvcc made from older headers: torch tells ninja about those of CUDA sources only if it has CUDA."""
    newest = max((ROOT / header).stat().st_mtime for header in headers())
    for built in (BUILD_TEMP / CSRC / "cuda" / "kernels").glob("*.o"):
        if built.stat().st_mtime < newest:
            built.unlink()


def wanted_cuda() -> str:
    wanted = os.environ.get("SMOOTHQUANT_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        fail(f"SMOOTHQUANT_CUDA is '{wanted}', expected 0, 1 or auto.")
    return wanted


def without_cuda(reason: str) -> Record:
    """Says that CUDA is left out and why; an error where it is asked for."""
    if wanted_cuda() == "1":
        fail(f"SMOOTHQUANT_CUDA=1, but {reason}.")
    record = cuda_toolkit.record_without_cuda(reason)
    print(f"smoothquant-ext: {record.sentence}", file=sys.stderr)
    return record


def find_toolkit() -> tuple[Toolkit | None, Record]:
    if wanted_cuda() == "0":
        return None, without_cuda("SMOOTHQUANT_CUDA=0")
    sites = [TORCH_DIR.parent, Path(sysconfig.get_path("purelib"))]
    try:
        toolkit = cuda_toolkit.find_toolkit(os.environ, torch.version.cuda, sites, read_flags("nvcc-if-known"))
    except CudaNotFound as missing:
        return None, without_cuda(str(missing))
    except ValueError as error:
        fail(str(error))
    return toolkit, cuda_toolkit.record_of(toolkit)


TOOLKIT, RECORD = find_toolkit()


class BuildExtension(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
    def finalize_options(self) -> None:
        super().finalize_options()
        # pip compiles in a throwaway folder; a fixed one lets ninja compile again only what changed.
        self.build_temp = str(BUILD_TEMP)

    def run(self) -> None:
        self.record = RECORD
        super().run()
        for folder in self.packages():
            if not self.record.cuda:
                # One left by an earlier build would be packed, or loaded, beside a newer _C.so.
                (folder / "_C_cuda.so").unlink(missing_ok=True)
            self.record.write(folder)

    def packages(self) -> list[Path]:
        """Where the package's objects go: for an editable install to the sources too."""
        folders = [Path(self.build_lib), *([Path()] if self.inplace else [])]
        return [folder / PACKAGE for folder in folders]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, PACKAGE, cuda_toolkit.RECORD_NAME))]

    def build_extensions(self) -> None:
        # torch wants an nvcc of its own major version. The kernels share no CUDA library with it that this could hurt.
        cpp_extension._check_cuda_version = lambda *_: None
        super().build_extensions()
        if not self.record.cuda:
            self.extensions[:] = [extension for extension in self.extensions if extension.name != CUDA_EXTENSION]

    def build_extension(self, extension: Extension) -> None:
        if extension.name != CUDA_EXTENSION:
            super().build_extension(extension)
            return
        log = BUILD_TEMP / "cuda.log"
        try:
            with cuda_toolkit.copied_output(log):
                make_stub()
                drop_stale_cuda_objects()
                super().build_extension(extension)
        except Exception as error:  # whatever setuptools, torch, ninja and compilers raise
            output = f"{log.read_text(errors='replace') if log.is_file() else ''}\n{error}"
            self.record = without_cuda(cuda_toolkit.why_not_compiled(output, TOOLKIT, extension.sources))


class BdistWheel(bdist_wheel):
    """Tags the wheel for any Python, because no Python symbol is used, and for this platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


EXTENSIONS = [cpu_extension(), *([cuda_extension(TOOLKIT)] if TOOLKIT else [])]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension, "bdist_wheel": BdistWheel})
