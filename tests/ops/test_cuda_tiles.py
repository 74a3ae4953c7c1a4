"""Our own tensor-core products on a GPU, each where its instructions are; on the CPU the same tests without them."""

from __future__ import annotations

import pytest
import torch
from op_bounds import check_gemm
from op_testing import (
    FLOAT8,
    HAS_CUDA,
    assert_same_bits,
    check_int8_product,
    check_largest_int8_sums,
    moved_to,
    randn,
    random_float8,
    random_int8,
    scales,
)

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda.families import families_of
from smoothquant_ext.ops.library import built

DEVICES = ["cpu", *(["cuda mma", "cuda wgmma"] if HAS_CUDA else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a product runs, on which of our own kernels."""
    name, _, family = request.param.partition(" ")
    if not family:
        return str(name)
    if f"{family}_int8" not in families():
        pytest.skip(f"this GPU has no {family}")
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", family)
    return str(name)


def families() -> tuple[str, ...]:
    """Those that this GPU can run."""
    major, minor = torch.cuda.get_device_capability()
    return families_of(10 * major + minor, built().archs)


# More tiles than a GPU has multiprocessors among them: 8 x 33.
SHAPES = [(4, 16), (33, 48), (64, 64), (576, 576), (1536, 576), (2048, 4096), (4100, 48)]


@pytest.mark.parametrize("m", [1, 8, 17, 64, 127, 128, 129, 1000])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_products_equal_the_oracle(device: str, m: int, n: int, k: int) -> None:
    check_int8_product(device, m, n, k)


def test_int8_sums_of_the_largest_kind(device: str) -> None:
    check_largest_int8_sums(device)


@pytest.mark.parametrize("b_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("a_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 8, 16), (20, 136, 208), (130, 272, 1040), (33, 64, 4096)])
def test_fp8_products_are_within_the_bound(
    device: str, m: int, n: int, k: int, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> None:
    if device == "cuda" and "mma_fp8" not in families():
        pytest.skip("this GPU has no fp8 tensor cores")
    a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
    arguments = (a, b, scales(m), scales(n, seed=1), randn(n))
    y = ops.w8a8_gemm(*moved_to(device, arguments), torch.bfloat16)
    check_gemm(y, *arguments, (m, n, k))


def test_runs_one_after_another_give_the_same_bits(device: str) -> None:
    """What was read or written too early would differ at times."""
    a, b = moved_to(device, (random_int8(1000, 2048), random_int8(1536, 2048, seed=1)))
    a_scale, b_scale = moved_to(device, (scales(1000), scales(1536)))
    first = ops.w8a8_gemm(a, b, a_scale, b_scale)
    for _ in range(50 if device == "cuda" else 2):
        assert_same_bits(ops.w8a8_gemm(a, b, a_scale, b_scale), first)


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU on which the CUDA kernels may run")
def test_cuda_graphs_capture_a_product(device: str) -> None:
    if device == "cpu":
        pytest.skip("the CPU has no graphs")
    b, b_scale = moved_to("cuda", reference.quantize_per_token(randn(96, 64, seed=1), torch.int8))
    x = randn(64, 64).cuda()
    ops.w8a8_linear(x, b, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.w8a8_linear(x, b, b_scale)
    for seed in (1, 2):
        x.copy_(randn(64, 64, seed=seed))
        graph.replay()
        assert_same_bits(y, reference.w8a8_linear(x.cpu(), b.cpu(), b_scale.cpu()))
