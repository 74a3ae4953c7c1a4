"""The process that runs kernels which nobody has proven: ``python -m smoothquant_ext.ops.cuda.child FAMILY DEVICE``.

It prints a line of JSON before every case, so that the last line of a process that hung or died names the case, and one
at the end. ``time WAY_DTYPE,...`` in the place of a family times these ways to multiply.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import settle
from .cases import Case, cases_of, difference
from .families import way_of
from .timing import time_ways

FORCED = "SMOOTHQUANT_CUDA_GEMM"
CANNOT = f"{FORCED} is "
"""In the message of a way that cannot compute a shape."""


def say(**values: Any) -> None:
    """Prints a line of the protocol."""
    print(json.dumps(values), flush=True)


def prove(family: str, device: str) -> None:
    """Runs the cases of a family up to the first wrong result."""
    product = way_of(family)
    # What surrounds products is proven with torch's, which nobody has to prove.
    os.environ[FORCED] = "torch" if product is None else product[0]
    count = 0
    for case in cases_of(family):
        say(case=case.name)
        try:
            results = run(case, device)
        except RuntimeError as error:
            if product is not None and CANNOT in str(error):
                continue
            if lacks_memory(error):
                say(could_not_run=f"no memory: {first_line(error)}")
            else:
                say(wrong=f"{case.name}: {first_line(error)}")
            return
        if wrong := difference(case, results, family):
            say(wrong=f"{case.name}: {wrong}")
            return
        count += 1
    say(right=count)  # a way that can compute none is never asked to compute more


def run(case: Case, device: str) -> list[Tensor]:
    """The results of a case; waits for them, so that an error is that of this case."""
    results = case.run(getattr(torch.ops.sq, case.op).default, device)
    torch.cuda.synchronize()
    return results


def lacks_memory(error: RuntimeError) -> bool:
    """Whether an error says that the GPU is full, which is no fault of a kernel."""
    signs = ("out of memory", "ALLOC_FAILED", "STATUS_NOT_INITIALIZED")  # of torch or CUDA, of cuBLAS, of its handles
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def first_line(error: Exception) -> str:
    """An error of CUDA is followed by advice."""
    return str(error).strip().partition("\n")[0]


def main(arguments: Sequence[str]) -> None:
    """Does what the module's text says."""
    settle.trust_all()
    task, *rest, device = arguments
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)  # raises, before any case, if another process has the GPU for itself
    torch.cuda.synchronize()
    if task == "time":
        for timing in time_ways([name for name in rest[0].split(",") if name], device):
            say(timing=list(timing))
        say(right=0)
    else:
        prove(task, device)


if __name__ == "__main__":
    main(sys.argv[1:])
