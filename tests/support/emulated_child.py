"""The process of a proof, on the emulated device: ``emulated_child.py FAMILY DEVICE``.

SQ_EMULATED_FAULT is a fault and a family, such as "hangs mma_int8": what the kernels of this family do.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from emulated_cuda import emulated_cuda

from smoothquant_ext.ops.cuda import cases, child, timing


def wrong(results: Any) -> Any:
    """The results with another last element."""
    first = results if isinstance(results, torch.Tensor) else results[0]
    if first.numel():
        first.view(-1)[-1] = 1 if first.view(-1)[-1].item() != 1 else 2
    return results


def hangs(_results: Any) -> Any:
    time.sleep(1000)


def crashes(_results: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def poisons(_results: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nadvice")


def lacks_memory(_results: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def lacks_memory_elsewhere(_results: Any) -> Any:
    raise RuntimeError("w8a8_gemm: cuBLASLt: CUBLAS_STATUS_ALLOC_FAILED")


FAULTS: dict[str, Callable[[Any], Any]] = {
    f.__name__: f for f in (wrong, hangs, crashes, poisons, lacks_memory, lacks_memory_elsewhere)
}


def small(every: Iterable[cases.Case]) -> Iterator[cases.Case]:
    """The cases whose product takes at most half a million multiplications, a million in a mixture of experts."""
    for case in every:
        arguments = case.arguments
        if case.op == "w8a8_gemm" and arguments["a"].numel() * len(arguments["b"]) > 500_000:
            continue
        if case.op == "w8a8_experts":
            an_expert = sum(weight[0].numel() for weight in arguments["weight"])
            if arguments["top_k_index"].numel() * an_expert > 1_000_000:
                continue
        yield case


def main() -> None:
    family = sys.argv[1]
    fault, _, of = os.environ.get("SQ_EMULATED_FAULT", "").partition(" ")
    run, cases_of = child.run, cases.cases_of

    def faulty(case: cases.Case, device: str) -> Any:
        results = run(case, device)
        return FAULTS[fault](results) if fault and of == family else results

    def time_us(calls: Any) -> float:
        """Something that differs from way to way, and needs no graph."""
        calls[0]()
        return float(len(os.environ["SMOOTHQUANT_CUDA_GEMM"]))

    def few(family: str) -> Any:
        """Those that a CPU computes in no time."""
        return list(small(cases_of(family)))[: int(os.environ.get("SQ_EMULATED_CASES", "1000"))]

    with (
        emulated_cuda(settled=False),
        patch.object(child, "run", faulty),
        patch.object(child, "cases_of", few),
        patch.object(timing, "time_us", time_us),
        patch.object(timing, "LAYERS", ((32, 48),)),
        patch.object(timing, "MOST_ROWS", 600),
        patch.object(timing, "COLD_BYTES", 0),
    ):
        child.main(sys.argv[1:])


if __name__ == "__main__":
    main()
