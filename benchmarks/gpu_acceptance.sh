#!/usr/bin/env bash
# Everything that a GPU can say about the CUDA kernels, within ten minutes:
#   benchmarks/gpu_acceptance.sh OUT_DIR
# Builds the objects if there are none (CI's can be carried here as they are), proves the kernels, runs the tests of the ops,
# the sanitizers and the benchmarks, each with a limit of its own. Results appear in OUT_DIR as they come; the last lines say
# what passed and how fast it was, also if a step was cut off. Environment:
#   PYTHON      the interpreter, with torch for CUDA, pytest and hypothesis [python3]
#   GPU_SITE    a folder with packages that the interpreter lacks, made by: pip install --target FOLDER pytest hypothesis
#   SECONDS_ALL how long all of it may take [570]
#   STEPS       a pattern of the steps to run, such as "prove|benchmarks" [all]
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_acceptance.sh OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
limit=${SECONDS_ALL:-570}
export PYTHONPATH="$PWD${GPU_SITE:+:$GPU_SITE}${PYTHONPATH:+:$PYTHONPATH}"

stop() { echo "gpu_acceptance: $1" >&2; exit 2; }

"$python" -c 'import torch' 2>/dev/null || stop "$python has no torch; set PYTHON to one that has it, built for CUDA"
"$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' \
  || stop "the torch of $python is built without CUDA; set PYTHON to one that has it"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
  || stop "torch sees no GPU on this machine, so there is nothing to accept; 'smoothquant info' says why"
"$python" -c 'import pytest, hypothesis' 2>/dev/null \
  || stop "$python lacks pytest or hypothesis; install them, or set GPU_SITE to a folder that has them"

rm -f "$out/steps.jsonl" "$out/bench.jsonl"
trap '"$python" benchmarks/cuda_cases.py "$out" | tee "$out/summary.txt"; exit "${PIPESTATUS[0]}"' EXIT
child=
trap '[ -z "$child" ] || kill "$child" 2>/dev/null; exit 143' TERM INT

# step NAME LIMIT COMMAND...: runs it for at most LIMIT seconds, or what is left of all of them.
step() {
  local name=$1 allowed=$2 began=$SECONDS result=passed status=0
  shift 2
  [[ $name =~ ${STEPS:-.} ]] || return 0
  [ "$((limit - SECONDS))" -gt "$allowed" ] || allowed=$((limit - SECONDS))
  if [ "$allowed" -le 5 ]; then
    result=skipped
  else
    printf '== %s (at most %s s)\n' "$name" "$allowed"
    # In the background, so that a signal ends this script now and not when the step is over.
    timeout --kill-after=5 "$allowed" "$@" >"$out/${name// /-}.log" 2>&1 &
    child=$!
    wait "$child" || status=$?
    [ "$status" -eq 0 ] || { result=FAILED; tail -n 20 "$out/${name// /-}.log"; }
    [ "$status" -ne 124 ] || result="cut off"
  fi
  printf '{"name": "%s", "result": "%s", "seconds": %s}\n' "$name" "$result" "$((SECONDS - began))" >>"$out/steps.jsonl"
  [ "$result" = passed ]
}

arch=$("$python" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
case "$arch" in 90 | 100 | 103) arch=${arch}a ;; esac
if [ ! -f smoothquant_ext/_C_cuda.so ]; then
  step "build" 240 env SMOOTHQUANT_CUDA=1 SMOOTHQUANT_CUDA_ARCHS="$arch" "$python" setup.py -q build_ext --inplace
fi

"$python" - >"$out/machine.json" <<'PYTHON'
import json, subprocess, torch
properties = torch.cuda.get_device_properties(0)
commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
print(json.dumps({"device": properties.name, "arch": 10 * properties.major + properties.minor, "commit": commit,
                  "torch": torch.__version__, "cuda": torch.version.cuda, "sms": properties.multi_processor_count}))
PYTHON
cat "$out/machine.json"

step "info" 30 "$python" -c 'from smoothquant_ext import ops; [print(*row, sep=" | ") for row in ops.info()]'
# The oracle first: if that is wrong, little else needs to be looked at.
step "prove" 150 env XDG_CACHE_HOME="$out/cache" "$python" -m smoothquant_ext.cli prove --again
export XDG_CACHE_HOME="$out/cache"  # the other steps use what was proven
# CPU instruction sets are CI's: one is enough here.
step "tests" 180 env SMOOTHQUANT_CPU_ISA=portable "$python" -m pytest -q -p no:cacheprovider --maxfail 20 \
  -k "cuda or Cuda" --junitxml "$out/tests.xml" tests/ops/test_quantize.py \
  tests/ops/test_norm_activation.py tests/ops/test_gemm_int8.py tests/ops/test_gemm_fp8.py tests/ops/test_cuda_ops.py
# Our own tensor-core products, apart from the rest: nothing else waits for them.
step "tile tests" 60 "$python" -m pytest -q -p no:cacheprovider --maxfail 20 -k "not cpu" tests/ops/test_cuda_tiles.py
if command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for check in memcheck:{quantize,norm_activation,skinny_int8,library_int8,mma_int8,wgmma_int8,mma_fp8,wgmma_fp8} \
    racecheck:{quantize,norm_activation,skinny_int8,mma_int8,wgmma_int8}; do
    step "$check" 45 compute-sanitizer --tool "${check%:*}" --error-exitcode 9 --kernel-name regex=sq \
      "$python" -m smoothquant_ext.ops.cuda.child "${check#*:}" cuda:0
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  echo "compute-sanitizer is not installed: memcheck and racecheck are left out"
fi
step "benchmarks" 400 "$python" benchmarks/bench_cuda.py "$out/bench.jsonl" --seconds "$((limit - SECONDS - 15))"
