"""Runs every CUDA kernel on small and awkward shapes and compares it with the oracle; for compute-sanitizer.

    SMOOTHQUANT_UNVALIDATED_CUDA=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \\
        python benchmarks/cuda_small_set.py [--own]

``--own`` runs this package's tensor-core products instead, as far as the GPU supports them. ``--device cpu`` runs
without a GPU, which tests the script.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from smoothquant_ext.ops.cuda_kernels import OLDEST_FP8, OWN_GEMMS, WGMMA, Gpu, own_gemms
from torch import Tensor

from smoothquant_ext import reference
from smoothquant_ext.ops.declare import DECLARED

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from op_cases import CASES, Problem, call, expected_of

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
ROWS = ((1, torch.float32), (577, torch.bfloat16), (4096, torch.bfloat16), (33000, torch.float16))
"""Short, odd, wide and very long rows, for the ops without a product."""
PRODUCTS = ((1, 9, 33), (5, 64, 640), (9, 30, 70), (40, 64, 64), (130, 48, 528))
"""M, N and K, few rows and many, of sizes that tensor cores take and that they do not."""

Case = tuple[str, dict[str, Any]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers from the CPU's generator, so that they are the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def library() -> Iterator[Case]:
    """Names of ops and arguments: every op that has CUDA kernels, with all the arguments that it takes."""
    for name, case in CASES.items():
        is_product = DECLARED[name].cpu == "gemm"
        shapes = [(m, k, n, torch.bfloat16) for m, n, k in PRODUCTS] if is_product else [(3, k, 1, x) for k, x in ROWS]
        for m, k, n, dtype in shapes if DECLARED[name].cuda else ():
            for eight_bit in case.eight_bit:
                *_, arguments = case.make(Problem((m,), k, n, dtype, eight_bit, packs=False))
                yield name, arguments


def own_products(arch: int) -> Iterator[tuple[str, Case]]:
    """Families of kernels, each with a product: less than a tile, several tiles and stages, a split k; all dtypes."""
    for family in own_gemms(Gpu("", arch), ("gemm_int8",)):
        for m, n, k in ((1, 33, 16), (40, 64, 64), (130, 48, 528), (300, 272, 1040), (20, 256, 4096)):
            for a_type in EIGHT_BIT if arch >= OLDEST_FP8 else EIGHT_BIT[:1]:
                for b_type in EIGHT_BIT[1:] if a_type != torch.int8 else EIGHT_BIT[:1]:
                    a, a_scale = reference.quantize_per_token(randn(m, k), a_type)
                    b, b_scale = reference.quantize_per_token(randn(n, k, seed=1), b_type)
                    arguments = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": randn(n, seed=2)}
                    yield family, ("w8a8_gemm", {**arguments, "out_dtype": torch.float32})


def main() -> int:
    """Runs all cases; exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    device = options.device
    wrong = []
    cases = [("library", case) for case in library()]
    if options.own:
        major, minor = torch.cuda.get_device_capability() if device == "cuda" else (WGMMA // 10, WGMMA % 10)
        cases = list(own_products(10 * major + minor))
    for family, (name, arguments) in cases:
        os.environ["SMOOTHQUANT_CUDA_GEMM"] = family
        case = CASES[name]
        try:
            case.check(call(case.op, arguments, device), expected_of(case, arguments, device), arguments, "")
        except AssertionError as error:
            asked = f" by {family}" if family in OWN_GEMMS else ""
            shapes = {key: tuple(v.shape) if isinstance(v, Tensor) else v for key, v in arguments.items()}
            wrong.append(f"{name}{asked} {shapes}: {error}")
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    print(f"{len(cases) - len(wrong)} of {len(cases)} calls were right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
