"""8-bit products through torch alone: which of torch's runs on which GPU, and what it gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_bounds import check_gemm
from op_testing import (
    EIGHT_BIT,
    FLOAT8,
    FLOATS,
    assert_same_bits,
    check_int8_product,
    check_largest_int8_sums,
    randn,
    random_float8,
    random_int8,
    scales,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_rules import CudaRules

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda import fallback_gemm
from smoothquant_ext.ops.cuda.fallback_gemm import PRODUCTS, Operands, Problem, choose_product

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = (75, 80, 86, 89, 90, 100, 120)


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "products"),
    [
        (INT8, INT8, ["int8"] * 7),
        (E4M3, E4M3, ["wide", "wide", "wide", "fp8", "fp8_rows", "fp8", "fp8"]),
        (E4M3, E5M2, ["wide", "wide", "wide", "fp8", "fp8", "fp8", "fp8"]),
        (E5M2, E4M3, ["wide", "wide", "wide", "fp8", "fp8", "fp8", "fp8"]),
        (E5M2, E5M2, ["wide"] * 7),
    ],
)
def test_the_product_of_every_gpu(a: torch.dtype, b: torch.dtype, products: list[str]) -> None:
    chosen = [choose_product(Problem(arch, 4096, 4096, a, b, BF16, None)) for arch in ARCHS]
    assert chosen == products
    assert choose_product(Problem(0, 4096, 4096, a, b, BF16, None)) == ("int8" if a == INT8 else "wide")


@pytest.mark.parametrize(
    ("change", "product"),
    [
        ({}, "fp8_rows"),
        ({"bias": BF16}, "fp8_rows"),
        ({"bias": FP32}, "fp8"),
        ({"bias": FP16}, "fp8"),
        ({"y": FP32}, "fp8"),
        ({"y": FP16}, "fp8"),
        ({"n": 4104}, "fp8"),
        ({"k": 4104}, "fp8"),
        ({"k": 0}, "fp8"),
    ],
    ids=str,
)
def test_scales_per_row_are_for_what_every_torch_takes(change: dict[str, object], product: str) -> None:
    problem = Problem(90, 4096, 4096, E4M3, E4M3, BF16, None)
    assert choose_product(problem._replace(**change)) == product  # type: ignore[arg-type]


def test_the_architecture_of_no_gpu() -> None:
    assert fallback_gemm.arch_of(torch.device("cpu")) == 0


# --- INT8, bit for bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 33, 64])
def test_int8_of_every_shape(n: int, arch: int) -> None:
    for m, k in itertools.product((0, 1, 2, 16, 17, 31, 32, 33), (1, 7, 8, 40, 127)):
        check_int8_product("cpu", m, n, k)


def test_int8_with_every_kind_of_scale_bias_and_output(arch: int) -> None:
    a, b = random_int8(7, 130), random_int8(70, 130, seed=1)
    biases = (None, *(randn(70, dtype=dtype) * 3 for dtype in FLOATS))
    a_scales = (scales(1), scales(1).reshape(()), scales(7), scales(7).reshape(7, 1))
    b_scales = (scales(1), scales(70), scales(70).reshape(70, 1))
    for arguments in itertools.product((a,), (b,), a_scales, b_scales, biases, FLOATS):
        assert_same_bits(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))


@pytest.mark.usefixtures("by_torch")
def test_the_largest_int8_sums_are_exact() -> None:
    check_largest_int8_sums("cpu")
    most = torch.full((20, 300), -128, dtype=INT8)
    y = ops.w8a8_gemm(most, most[:9], torch.ones(1), torch.ones(1), None, FP32)
    assert torch.equal(y, torch.full((20, 9), 128.0 * 128 * 300))


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_scales_of_any_bits(out_dtype: torch.dtype) -> None:
    """Sums of +-1 times every exponent, subnormals, infinities and NaNs."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 2.98e-8, 3.3895e38, 1e-45, 9.2e-41, torch.nan, torch.inf, 0.0])
    values = torch.cat([bits.view(FP32), edges, -edges])
    b = torch.ones(len(values), 1, dtype=INT8)
    for sign in (1, -1):
        a = torch.full((3, 1), sign, dtype=INT8)
        arguments = (a, b, torch.ones(1), values, None, out_dtype)
        assert_same_bits(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))


# --- FP8, within a derived bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("b_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("a_dtype", FLOAT8, ids=str)
def test_fp8_is_within_the_bound(a_dtype: torch.dtype, b_dtype: torch.dtype, arch: int) -> None:
    for i, (m, n, k) in enumerate(itertools.product((1, 16, 40), (1, 16, 64, 70), (1, 16, 130, 256))):
        a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
        bias = (None, randn(n), randn(n, dtype=BF16), randn(n, dtype=FP16))[i % 4]
        for out_dtype in (BF16, FP32):  # e5m2 by e5m2 overflows fp16
            for a_scale, b_scale in ((scales(m), scales(n, 1)), (scales(1), scales(n, 1)), (scales(m), scales(1))):
                arguments = (a, b, a_scale, b_scale, bias)
                check_gemm(ops.w8a8_gemm(*arguments, out_dtype), *arguments, (m, n, k, out_dtype))


def test_every_product_runs_where_it_should(arch: int) -> None:
    """And the row-wise one is asked for what torch takes: ``CudaRules`` looks."""
    a, b = random_float8(20, 64, dtype=E4M3), random_float8(32, 64, dtype=E4M3)
    with CudaRules(arch) as rules:
        ops.w8a8_gemm(a, b, scales(20), scales(32))
        ops.w8a8_gemm(a, b, scales(1), scales(1))
        ops.w8a8_gemm(a, b, scales(20), scales(32), randn(33, dtype=BF16)[1:])  # which does not begin at 16 bytes
        ops.w8a8_gemm(a.view(-1)[1:-63].view(19, 64), b, scales(19), scales(32))
    assert rules.seen["scaled_mm"] == (4 if arch >= 89 else 0)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("n", [64, 70])
def test_nan_and_infinity_stay_in_their_row_and_column(n: int, dtype: torch.dtype, arch: int) -> None:
    a, b = random_float8(40, 64, dtype=dtype), random_float8(n, 64, dtype=dtype, seed=1)
    nan = torch.tensor([torch.nan]).to(dtype).view(torch.uint8)
    a.view(torch.uint8)[3, 5] = nan
    b.view(torch.uint8)[n - 2, 63] = nan
    a_scale = torch.ones(40)
    a_scale[7] = torch.nan  # as quantizing a row that is not finite makes it
    expected = torch.zeros(40, n, dtype=torch.bool)
    expected[[3, 7]] = True
    expected[:, n - 2] = True
    assert torch.equal(ops.w8a8_gemm(a, b, a_scale, torch.ones(n)).isnan(), expected)


def test_no_k_at_all(arch: int) -> None:
    for dtype in EIGHT_BIT:
        a, b, one = torch.zeros(20, 0).to(dtype), torch.zeros(32, 0).to(dtype), torch.ones(1)
        assert not ops.w8a8_gemm(a, b, one, one).any()
        bias = randn(32, dtype=BF16)
        assert_same_bits(ops.w8a8_gemm(a, b, one, one, bias), bias.expand(20, -1))
        assert ops.w8a8_gemm(a, b[:0], one, one).shape == (20, 0)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("wide", [BF16, FP16], ids=str)
def test_widening_is_exact(wide: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(every.to(wide).double().nan_to_num(7.5), every.double().nan_to_num(7.5))


@pytest.mark.parametrize(("arch", "dtype"), [(75, FP16), (80, BF16), (90, BF16)])
def test_widened_sums_on_a_gpu(arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch multiplies 16-bit values to fp32 sums: its own shape function says so, without a GPU."""
    monkeypatch.setattr(fallback_gemm, "arch_of", lambda device: arch)
    asked: list[tuple[torch.dtype, torch.dtype]] = []
    mm = torch.mm

    def recorded(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        asked.append((a.dtype, b.dtype))
        return mm(a, b, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "mm", recorded)
    with FakeTensorMode():
        a, b = (torch.empty(rows, 40, dtype=E5M2, device="cuda") for rows in (20, 9))
        sums = fallback_gemm.wide_sums(a, b)
    assert (sums.shape, sums.dtype, sums.device.type) == ((20, 9), FP32, "cuda")
    assert asked == [(dtype, dtype)]


# --- inside other ops -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_an_mlp_has_the_bits_of_its_steps(dtype: torch.dtype) -> None:
    x = randn(9, 70, dtype=BF16)
    (gate, gate_scale), (up, up_scale), (down, down_scale) = (
        reference.quantize_per_token(randn(*shape, seed=seed), dtype)
        for seed, shape in enumerate(((130, 70), (130, 70), (50, 130)))
    )
    bias = randn(130)
    y = ops.w8a8_mlp(x, [gate, up, down], [gate_scale, up_scale, down_scale], [bias, None, None])
    first, second = ops.w8a8_linear_group(x, [gate, up], [gate_scale, up_scale], [bias, None])
    assert_same_bits(first, ops.w8a8_linear(x, gate, gate_scale, bias))
    q, scale = ops.silu_mul_quantize(first, second, dtype)
    assert_same_bits(y, ops.w8a8_gemm(q, down, scale, down_scale))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_leave_their_operands_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = INT8 if name == "int8" else E4M3
    a, b = (randn(rows, 64, seed=rows).mul(9).to(dtype) for rows in (32, 48))
    operands = Operands(a, b, scales(32)[:, None], scales(48), randn(48, dtype=BF16), BF16)
    before = [each.clone() for each in operands[:5]]
    PRODUCTS[name](operands)
    for one, other in zip(operands[:5], before, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.usefixtures("gpu")
def test_fp8_on_a_device(arch: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scales a row and a column, and single ones, of which torch is particular about the strides."""
    monkeypatch.setattr(fallback_gemm, "arch_of", lambda _device: arch)
    a, b = (random_float8(rows, 48, dtype=E4M3, seed=rows) for rows in (m, 32))
    for a_scale, b_scale in ((scales(m), scales(32)), (scales(1), scales(1)), (scales(1).reshape(()), scales(32))):
        arguments = (a, b, a_scale, b_scale, randn(32).to(BF16))
        there = [each.to("cuda") for each in arguments]
        check_gemm(fallback_gemm.w8a8_gemm(*there, BF16), *arguments)
