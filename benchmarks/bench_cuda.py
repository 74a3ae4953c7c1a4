"""Times the CUDA ops beside torch's products, on random data in cold caches; writes JSON lines as it measures.

    python benchmarks/bench_cuda.py OUT.jsonl [--seconds 240]

Every case has several sets of buffers, together twice the L2 cache. A CUDA graph runs each set once. A time is the
median of replays, measured by events, divided by the number of sets.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cuda_cases import MIB, PRODUCER_COLUMNS, PRODUCER_ROWS, PRODUCERS, Gemm, Record, copies, gemms
from torch import Tensor

from smoothquant_ext import ops

REPLAYS = 9
E4M3 = torch.float8_e4m3fn
DEVICE = "cuda"

Call = Callable[[], Any]


def time_us(calls: list[Call]) -> float:
    """Microseconds of one call; each of the calls has different data."""
    for call in calls[:2]:  # what is made once is made now: handles, choices of algorithms
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    graph.reset()
    return statistics.median(times)


# --- products -------------------------------------------------------------------------------------------------------


def _random_fp8(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16).to(E4M3)


def _random_int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, device=DEVICE, dtype=torch.int8)


def _scales(count: int) -> Tensor:
    return torch.rand(count, device=DEVICE) * 0.01 + 1e-3


def _ours(case: Gemm, make: Callable[..., Tensor]) -> Call:
    a, b, a_scale, b_scale = make(case.m, case.k), make(case.n, case.k), _scales(case.m), _scales(case.n)
    return lambda: ops.w8a8_gemm(a, b, a_scale, b_scale)


def _by(family: str, make: Callable[..., Tensor]) -> Callable[[Gemm], Call]:
    """The same on one of this package's tensor-core kernels."""

    def call_of(case: Gemm) -> Call:
        call = _ours(case, make)

        def asked() -> Any:
            os.environ["SMOOTHQUANT_CUDA_GEMM"] = family
            try:
                return call()
            finally:
                del os.environ["SMOOTHQUANT_CUDA_GEMM"]

        return asked

    return call_of


def _linear(case: Gemm) -> Call:
    """Quantization and product."""
    x = torch.randn(case.m, case.k, device=DEVICE, dtype=torch.bfloat16)
    b, b_scale = _random_int8(case.n, case.k), _scales(case.n)
    return lambda: ops.w8a8_linear(x, b, b_scale)


def _bf16(case: Gemm) -> Call:
    x = torch.randn(case.m, case.k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(case.n, case.k, device=DEVICE, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(x, w)


def _int_mm(case: Gemm) -> Call:
    a, b = _random_int8(case.m, case.k), _random_int8(case.n, case.k)
    return lambda: torch._int_mm(a, b.t())


def _scaled_mm(case: Gemm) -> Call:
    a, b, a_scale, b_scale = _random_fp8(case.m, case.k), _random_fp8(case.n, case.k), _scales(case.m), _scales(case.n)
    scales = {"scale_a": a_scale[:, None], "scale_b": b_scale[None, :]}
    return lambda: torch._scaled_mm(a, b.t(), out_dtype=torch.bfloat16, **scales)


ENGINES: dict[str, Callable[[Gemm], Call]] = {
    "int8": lambda case: _ours(case, _random_int8),
    "fp8": lambda case: _ours(case, _random_fp8),
    "linear": _linear,
    "bf16": _bf16,
    "int_mm": _int_mm,
    "scaled_mm": _scaled_mm,
}


OWN_ENGINES: dict[str, Callable[[Gemm], Call]] = {
    f"{dtype}_{family}": _by(family, make)
    for dtype, make in (("int8", _random_int8), ("fp8", _random_fp8))
    for family in ("mma", "wgmma")
}


def time_gemm(case: Gemm, cache_bytes: int) -> Iterator[Record]:
    """A record for each engine that can compute the case."""
    for name, make in {**ENGINES, **OWN_ENGINES}.items():
        element = 2 if name == "bf16" else 1
        moved = element * (case.n * case.k + case.m * case.k) + 2 * case.m * case.n
        try:
            calls = [make(case) for _ in range(copies(moved, cache_bytes))]
            taken = time_us(calls)
        except RuntimeError as error:  # _int_mm wants more than 16 rows, _scaled_mm and wgmma a new GPU
            if name in ("int8", "fp8", "linear"):
                raise
            yield {"what": f"{name} refused", "m": case.m, "n": case.n, "k": case.k, "reason": str(error)[:200]}
            continue
        yield {"what": name, **case._asdict(), "microseconds": taken, "bytes": moved}


# --- what moves bytes -----------------------------------------------------------------------------------------------


def time_copy() -> Record:
    """The reference bandwidth: copying 512 MiB."""
    source = torch.empty(512 * MIB, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    taken = time_us([lambda: target.copy_(source)] * 4)
    return {"what": "copy", "microseconds": taken, "bytes": 2 * source.numel()}


def producer_call(name: str, rows: int, columns: int) -> Call:
    """One call with new data."""
    x, y = (torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    w, one = torch.ones(columns, device=DEVICE, dtype=torch.bfloat16), torch.full((1,), 0.03, device=DEVICE)
    calls: dict[str, Call] = {
        "quantize_per_token": lambda: ops.quantize_per_token(x, torch.int8),
        "quantize_static": lambda: ops.quantize_static(x, one, torch.int8),
        "rms_norm_quantize": lambda: ops.rms_norm_quantize(x, w, 1e-5, torch.int8),
        "rms_norm_quantize, residual": lambda: ops.rms_norm_quantize(x, w, 1e-5, torch.int8, y),
        "layer_norm_quantize, residual": lambda: ops.layer_norm_quantize(x, w, w, 1e-5, torch.int8, y),
        "silu_mul_quantize": lambda: ops.silu_mul_quantize(x, y, torch.int8),
        "gelu_mul_quantize": lambda: ops.gelu_mul_quantize(x, y, torch.int8),
        "gelu_quantize": lambda: ops.gelu_quantize(x, torch.int8),
        "relu_quantize": lambda: ops.relu_quantize(x, torch.int8),
        "rms_norm": lambda: ops.rms_norm(x, w, 1e-5),
    }
    return calls[name]


def time_producer(name: str, columns: int, cache_bytes: int) -> Record:
    """One producer at 4096 rows."""
    moved = PRODUCERS[name] * PRODUCER_ROWS * columns
    calls = [producer_call(name, PRODUCER_ROWS, columns) for _ in range(copies(moved, cache_bytes))]
    return {"what": name, "rows": PRODUCER_ROWS, "k": columns, "microseconds": time_us(calls), "bytes": moved}


# --- everything -----------------------------------------------------------------------------------------------------


def measure(cache_bytes: int) -> Iterator[Record]:
    """Every record, the most important first."""
    yield time_copy()
    for columns in PRODUCER_COLUMNS:
        for name in PRODUCERS:
            yield time_producer(name, columns, cache_bytes)
    for case in gemms():
        yield from time_gemm(case, cache_bytes)


def main() -> int:
    """Measures until everything is done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_cuda: torch sees no GPU here; 'smoothquant info' says why", file=sys.stderr)
        return 2
    properties = torch.cuda.get_device_properties(0)
    started = time.monotonic()
    with arguments.output.open("w") as file:
        about = {"what": "machine", "device": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda}
        print(json.dumps(about), file=file, flush=True)
        for record in measure(properties.L2_cache_size):
            print(json.dumps(record), file=file, flush=True)
            if time.monotonic() - started > arguments.seconds:
                print(f"bench_cuda: stopped after {arguments.seconds:.0f} s", file=sys.stderr)
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
