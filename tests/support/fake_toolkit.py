"""A folder that looks like a CUDA toolkit, with a shell script as its nvcc."""

from __future__ import annotations

from pathlib import Path

COMPILES = 'gcc -c -x c /dev/null -o "$output"'
FAILS = 'echo "$source(12): error: identifier \\"frob\\" is undefined" >&2; exit 2'
CRASHES = "kill -SEGV $$"
DIES_INSIDE = "echo \"nvcc error   : 'cicc' died due to signal 11 (Invalid memory reference)\" >&2; exit 139"

_NVCC = """#!/bin/sh
previous= output= source= is_dry=
for argument; do
  case "$argument" in
    --version) echo 'nvcc: NVIDIA (R) Cuda compiler driver'
               echo 'Cuda compilation tools, release @RELEASE@, V@RELEASE@.99'; exit 0 ;;
    --dryrun) is_dry=1 ;;
    -gencode=arch=compute_*)
      number=${argument#-gencode=arch=compute_}; number=${number%%,*}
      case " @ARCHS@ " in
        *" $number "*) ;;
        *) echo "nvcc fatal   : Unsupported gpu architecture 'compute_$number'" >&2; exit 1 ;;
      esac ;;
    --compress-mode=*)
      [ @RELEASE@ != 12.4 ] || { echo "nvcc fatal   : Unknown option '$argument'" >&2; exit 1; } ;;
    *.cu) source=$argument ;;
  esac
  if [ "$previous" = -o ]; then output=$argument; fi
  previous=$argument
done
if [ "$is_dry" ]; then echo '#$ TOP=@HOME@/bin/..' >&2; exit 0; fi
@COMPILE@
"""

ARCHS = {
    "12.4": "80 86 89 90 90a",
    "12.8": "80 86 89 90 90a 100 100a 120 120a",
    "13.0": "80 86 89 90 90a 100 100a 120 120a",
}


def fake_toolkit(home: Path, release: str = "13.0", compiles: str = COMPILES, archs: str | None = None) -> Path:
    """Makes one in ``home``; ``compiles`` is what its nvcc does to ``$source`` and ``$output``."""
    header = home / "include" / "cublasLt.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    header.touch()
    (home / "lib64").mkdir(exist_ok=True)
    (home / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    script = _NVCC.replace("@RELEASE@", release).replace("@HOME@", str(home)).replace("@COMPILE@", compiles)
    write_nvcc(home, script.replace("@ARCHS@", ARCHS.get(release, "") if archs is None else archs))
    return home


def write_nvcc(home: Path, script: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(script)
    nvcc.chmod(0o755)
