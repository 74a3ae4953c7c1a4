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
from typing import Any

import torch
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda_kernels import OLDEST_FP8, OWN_GEMMS, WGMMA, Gpu, own_gemms

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers from the CPU's generator, so that they are the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def producers() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of ops and arguments, for short, odd, wide and very long rows."""
    for columns, dtype in ((1, torch.float32), (577, torch.bfloat16), (4096, torch.bfloat16), (33000, torch.float16)):
        x, y, w = randn(3, columns).to(dtype), randn(3, columns, seed=1).to(dtype), randn(columns, seed=2)
        one = torch.tensor([0.03])
        for eight_bit in EIGHT_BIT:
            yield "quantize_per_token", (x, eight_bit, w.abs() + 0.5)
            yield "quantize_static", (x, one, eight_bit)
            yield "rms_norm_quantize", (x, w, 1e-5, eight_bit, y)
            yield "layer_norm_quantize", (x, w, w, 1e-5, eight_bit, None, one)
            yield "silu_mul_quantize", (x, y, eight_bit)
            yield "gelu_mul_quantize", (x, y, eight_bit, one, "tanh")
            yield "gelu_quantize", (x, eight_bit)
            yield "relu_quantize", (x, eight_bit)
        yield "rms_norm", (x, w, 1e-5)


def products() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Products of few and many rows, of sizes that tensor cores support and that they do not."""
    for m, n, k in ((1, 9, 33), (5, 64, 640), (9, 30, 70), (40, 64, 64), (130, 48, 528)):
        for eight_bit in EIGHT_BIT:
            a, a_scale = reference.quantize_per_token(randn(m, k), eight_bit)
            b, b_scale = reference.quantize_per_token(randn(n, k, seed=1), eight_bit)
            yield "w8a8_gemm", (a, b, a_scale, b_scale, randn(n, seed=2), torch.float32)
        b, b_scale = reference.quantize_per_token(randn(n, k, seed=1), torch.int8)
        yield "w8a8_linear", (randn(m, k).bfloat16(), b, b_scale)


def own_products(arch: int) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Families of kernels, each with a product: less than a tile, several tiles and stages, a split k; all dtypes."""
    for family in own_gemms(Gpu("", arch), ("gemm_int8",)):
        for m, n, k in ((1, 33, 16), (40, 64, 64), (130, 48, 528), (300, 272, 1040), (20, 256, 4096)):
            for a_type in EIGHT_BIT if arch >= OLDEST_FP8 else EIGHT_BIT[:1]:
                for b_type in EIGHT_BIT[1:] if a_type != torch.int8 else EIGHT_BIT[:1]:
                    a, a_scale = reference.quantize_per_token(randn(m, k), a_type)
                    b, b_scale = reference.quantize_per_token(randn(n, k, seed=1), b_type)
                    yield family, "w8a8_gemm", (a, b, a_scale, b_scale, randn(n, seed=2), torch.float32)


def differs(actual: Tensor, expected: Tensor, is_exact: bool) -> bool:
    """Whether a result is wrong: any bit of it or, of an fp8 product, more than the precision of tensor cores."""
    actual = actual.cpu()
    if is_exact:
        return not torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((actual - expected).abs() > 0.02 * scale).any())


def main() -> int:
    """Runs all cases; exit status 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--own", action="store_true")
    options = parser.parse_args()
    device = options.device
    wrong = []
    cases = [("library", *case) for case in (*producers(), *products())]
    if options.own:
        major, minor = torch.cuda.get_device_capability() if device == "cuda" else (WGMMA // 10, WGMMA % 10)
        cases = list(own_products(10 * major + minor))
    for family, name, arguments in cases:
        os.environ["SMOOTHQUANT_CUDA_GEMM"] = family
        there = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
        actual, expected = getattr(ops, name)(*there), getattr(reference, name)(*arguments)
        pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
        is_exact = name != "w8a8_gemm" or arguments[0].dtype == torch.int8
        if any(differs(one, other, is_exact) for one, other in pairs):
            asked = f" by {family}" if family in OWN_GEMMS else ""
            wrong.append(f"{name}{asked} {[tuple(v.shape) if isinstance(v, Tensor) else v for v in arguments]}")
    for what in wrong:
        print(f"WRONG: {what}", file=sys.stderr)
    print(f"{len(cases) - len(wrong)} of {len(cases)} calls were right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
