#!/usr/bin/env bash
# Runs the op tests with one wheel in fresh environments, from a folder where the source tree cannot be imported:
#   tests/packaging/wheel_matrix.sh WHEEL [PYTHON:TORCH ...]     such as  python3.12:torch==2.11.*
# By default under the oldest torch that is supported and under the newest, which pip decides.
set -euo pipefail

if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: tests/packaging/wheel_matrix.sh WHEEL [PYTHON:TORCH ...]" >&2
  exit 2
fi
wheel=$(realpath "$1")
shift
tests=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] || set -- "python3:torch==2.11.*" "python3:torch"

case "$wheel" in
  *-py3-none-linux_*.whl) ;;
  *) echo "$wheel is not tagged py3-none-linux: it would not install under every Python" >&2; exit 1 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$tests" "$work/tests"
cd "$work"

for pair; do
  python=${pair%%:*} torch=${pair#*:}
  printf '\n== %s, %s\n' "$torch" "$("$python" --version)"
  "$python" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir "$torch" "$wheel[test]"
  "$work/venv/bin/python" - <<'PYTHON'
import json, pathlib, sys, torch, smoothquant_ext.ops

folder = pathlib.Path(smoothquant_ext.__file__).parent
print(f"torch {torch.__version__}, {folder.relative_to(sys.prefix)}")
print(json.loads((folder / "_build.json").read_text())["sentence"])
if torch.version.cuda and (folder / "_C_cuda.so").exists():
    for op in ("quantize_per_token", "quantize_static"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sq::{op}", "CUDA"), f"{op} has no CUDA kernel"
    print("CUDA kernels are registered")
PYTHON
  "$work/venv/bin/python" -m pytest -q -p no:cacheprovider --import-mode=importlib \
    -o pythonpath=tests/support tests/ops
  rm -rf "$work/venv"
done
