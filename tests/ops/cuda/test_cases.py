"""The cases of the proof: they cover what a family computes, accept what is right, and see one wrong element."""

from __future__ import annotations

import inspect

import pytest
import torch
from emulated_child import small
from torch import Tensor

from smoothquant_ext import reference
from smoothquant_ext.ops.cuda.cases import Case, cases_of, difference
from smoothquant_ext.ops.cuda.families import PRODUCERS, families_of
from smoothquant_ext.ops.declare import DECLARED

RELEASE = "80+PTX 89 90a 100a 120"
EIGHT_BIT = {torch.int8, torch.float8_e4m3fn, torch.float8_e5m2}


@pytest.mark.parametrize(
    ("arch", "archs", "lacks"),
    [
        (80, RELEASE, {"library_fast_fp8", "mma_fp8", "wgmma_int8", "wgmma_fp8"}),
        (89, RELEASE, {"wgmma_int8", "wgmma_fp8"}),
        (90, RELEASE, set()),
        (90, "80 90", {"wgmma_int8", "wgmma_fp8"}),
        (100, RELEASE, {"wgmma_int8", "wgmma_fp8"}),
    ],
)
def test_a_gpu_has_the_families_of_its_architecture(arch: int, archs: str, lacks: set[str]) -> None:
    assert set(families_of(90, RELEASE)) - set(families_of(arch, archs)) == lacks


def test_every_op_without_a_product_is_in_a_family_of_its_own() -> None:
    for family in PRODUCERS:
        ops = {case.op for case in cases_of(family)}
        assert ops == {name for name, declaration in DECLARED.items() if declaration.cuda == (family,)}
        for op in ops:
            cases = [case for case in cases_of(family) if case.op == op]
            inputs = [case.arguments.get("x", case.arguments.get("gate")) for case in cases]
            assert {x.dtype for x in inputs} == {torch.float32, torch.bfloat16, torch.float16}
            assert {1, 9, 17, 64, 300} <= {len(x) for x in inputs}
            assert {12288, 16384} <= {x.shape[1] for x in inputs}
            assert any(x.isnan().any() and x.isinf().any() and (x == 0).all(1).any() for x in inputs)
            if op != "rms_norm":
                assert {case.arguments["dtype"] for case in cases} == EIGHT_BIT
            if "rotate" in inspect.signature(getattr(reference, op)).parameters:
                rotated = [case.arguments for case in cases if case.arguments.get("rotate")]
                assert {each["rotate"] for each in rotated} == {16, 128, 256}
                assert {each.get("x", each.get("gate")).dtype for each in rotated} == {x.dtype for x in inputs}
                assert {each["dtype"] for each in rotated} == EIGHT_BIT


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_products_have_every_kind_of_arguments(dtype: str) -> None:
    arguments = [case.arguments for case in cases_of(f"library_{dtype}")]
    assert {1, 9, 17, 64, 300} <= {len(each["a"]) for each in arguments}
    assert {None if each["bias"] is None else each["bias"].dtype for each in arguments} == {
        None,
        torch.float32,
        torch.bfloat16,
        torch.float16,
    }
    assert {each["out_dtype"] for each in arguments} == {torch.float32, torch.bfloat16, torch.float16}
    assert {each["a_scale"].numel() == 1 for each in arguments if len(each["a"]) > 1} == {True, False}
    if dtype == "fp8":
        pairs = {(each["a"].dtype, each["b"].dtype) for each in arguments}
        assert len(pairs) == 4
        # What a GPU of 9.0 computes in one pass, scales and bias included; see gemm_plan.h.
        assert any(
            len(each["a"]) > 8
            and each["a"].shape[1] % 16 == len(each["b"]) % 16 == 0
            and each["a_scale"].numel() > 1
            and each["bias"] is not None
            and each["bias"].dtype == each["out_dtype"] != torch.float32
            for each in arguments
        )


FAMILIES = ["quantize", "norm_activation", "library_int8", "skinny_fp8", "mma_fp8"]


def oracle(case: Case) -> list[Tensor]:
    results = getattr(reference, case.op)(**case.arguments)
    return [results] if isinstance(results, Tensor) else list(results)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_is_accepted_and_one_wrong_element_is_seen(family: str) -> None:
    for case in small(cases_of(family)):
        results = oracle(case)
        assert difference(case, results[0] if len(results) == 1 else results, family) == ""
        for index, result in enumerate(results):
            if not result.numel():
                continue
            changed = [each.clone() for each in results]
            last = changed[index].view(-1)[-1:]
            is_product = last.dtype.itemsize > 1 and case.op in ("w8a8_gemm", "w8a8_experts")  # whose bounds are wide
            far = 3e4 if case.op == "w8a8_gemm" else 1e7
            other = far if is_product else 1 if float(last) != 1 else 2
            last.copy_(torch.full_like(last, other) if last.dtype != torch.int8 else last ^ 1)
            said = difference(case, changed[0] if len(changed) == 1 else changed, family)
            assert "elements are wrong, the first at [" in said, (case.name, index)
        shorter = [each[..., :-1] for each in results]
        assert " instead of " in difference(case, shorter[0] if len(shorter) == 1 else shorter, family) or not len(
            results[0]
        )


def test_a_row_that_should_be_nan_has_to_be() -> None:
    case = next(case for case in cases_of("mma_fp8") if len(case.arguments["a"]) > 1)
    result = oracle(case)[0]
    assert result[1].isnan().all()
    assert difference(case, result.nan_to_num(0.0), "mma_fp8").startswith(f"{result.shape[1]} of")


def test_sums_that_lose_small_addends_are_seen() -> None:
    """As fast accumulation does: 14 bits, over all of K."""
    *_, case = cases_of("library_fast_fp8")
    sums = torch.zeros(20, 16)
    for _ in range(case.arguments["a"].shape[1] // 32):
        sums = sums + 32
        quantum = torch.exp2(sums.log2().floor() - 9)  # of a coarser kind, so that 4,096 values of K show it
        sums = (sums / quantum).floor() * quantum - quantum
    scale = case.arguments["a_scale"].reshape(-1, 1) * case.arguments["b_scale"]
    assert difference(case, (sums * scale).to(torch.bfloat16), "library_fast_fp8")


def test_a_case_has_a_name_that_can_be_read() -> None:
    names = [case.name for case in cases_of("quantize")]
    assert names[0] == "quantize_per_token(x=float32[1, 577], dtype=int8)"
    with pytest.raises(ValueError, match="there is no family 'gemm' of kernels"):
        next(cases_of("gemm"))
