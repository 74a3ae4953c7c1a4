"""What torch and the user rely on besides the numbers: errors, schemas, fake kernels, torch.compile, packing, info."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import public_ops
from op_testing import EIGHT_BIT, FLOAT8, ISAS, Call, cpu_isa, randn, random_int8
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops import library


def weight(n: int = 9, k: int = 40, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return reference.quantize_per_token(randn(n, k, seed=7), dtype)


# --- errors ---------------------------------------------------------------------------------------------------------

X = torch.ones(6, 40)
A = random_int8(6, 40)
B, B_SCALE = weight()
PACKED = ops.prepack_weight(B)
ONE = torch.ones(1)
PER_ROW = torch.ones(6)

FLOAT = "expected float32, bfloat16 or float16"
EIGHT = "expected int8, float8_e4m3fn or float8_e5m2"
POSITIVE = "expected a positive finite number"
WEIGHT = "expected [N, K] or what prepack_weight returns"

QUANTIZE_ERRORS: list[tuple[Call, str]] = [
    (lambda: ops.quantize_per_token(X.double(), torch.int8), f"quantize_per_token: x is float64, {FLOAT}"),
    (lambda: ops.quantize_per_token(X.int(), torch.int8), f"quantize_per_token: x is int32, {FLOAT}"),
    (lambda: ops.quantize_per_token(X, torch.uint8), f"quantize_per_token: dtype is uint8, {EIGHT}"),
    (lambda: ops.quantize_per_token(X, torch.float16), f"quantize_per_token: dtype is float16, {EIGHT}"),
    (lambda: ops.quantize_per_token(ONE[0], torch.int8), "quantize_per_token: x has no dimensions, expected [..., K]"),
    (
        lambda: ops.quantize_per_token(X, torch.int8, torch.ones(39)),
        "quantize_per_token: smooth has 39 elements, expected K=40",
    ),
    (
        lambda: ops.quantize_per_token(X, torch.int8, torch.ones(40).half()),
        "quantize_per_token: smooth is float16, expected float32",
    ),
    (lambda: ops.quantize_static(X.long(), ONE, torch.int8), f"quantize_static: x is int64, {FLOAT}"),
    (lambda: ops.quantize_static(X, ONE, torch.int32), f"quantize_static: dtype is int32, {EIGHT}"),
    (lambda: ops.quantize_static(X, PER_ROW, torch.int8), "quantize_static: scale has 6 elements, expected 1"),
    (lambda: ops.quantize_static(X, ONE.double(), torch.int8), "quantize_static: scale is float64, expected float32"),
    (lambda: ops.quantize_static(X, ONE * 0, torch.int8), f"quantize_static: scale is 0, {POSITIVE}"),
    (lambda: ops.quantize_static(X, -ONE, torch.int8), f"quantize_static: scale is -1, {POSITIVE}"),
    (lambda: ops.quantize_static(X, ONE * torch.inf, torch.int8), f"quantize_static: scale is inf, {POSITIVE}"),
    (lambda: ops.quantize_static(X, ONE * torch.nan, torch.int8), f"quantize_static: scale is nan, {POSITIVE}"),
    (lambda: ops.prepack_weight(X), f"prepack_weight: weight is float32, {EIGHT}"),
    (lambda: ops.prepack_weight(A[0]), "prepack_weight: weight has shape [40], expected [N, K] or [E, N, K]"),
    (
        lambda: ops.prepack_weight(PACKED),
        "prepack_weight: weight has shape [1, 17, 64, 4], expected [N, K] or [E, N, K]",
    ),
    (
        lambda: ops.prepack_weight(torch.ones(1, 131072, dtype=torch.int8)),
        "prepack_weight: K is 131072, and int32 sums of int8 products are exact only up to K=131071",
    ),
]

GEMM_ERRORS: list[tuple[Call, str]] = [
    (lambda: ops.w8a8_gemm(X, B, ONE, B_SCALE), f"w8a8_gemm: a is float32, {EIGHT}"),
    (lambda: ops.w8a8_gemm(A, X, ONE, B_SCALE), f"w8a8_gemm: b is float32, {EIGHT}"),
    (
        lambda: ops.w8a8_gemm(A, B.to(torch.float8_e4m3fn), ONE, B_SCALE),
        "w8a8_gemm: a is int8 and b is float8_e4m3fn, expected both int8 or both float8",
    ),
    (
        lambda: ops.w8a8_gemm(A.to(torch.float8_e5m2), B, ONE, B_SCALE),
        "w8a8_gemm: a is float8_e5m2 and b is int8, expected both int8 or both float8",
    ),
    (lambda: ops.w8a8_gemm(A[0, 0], B, ONE, B_SCALE), "w8a8_gemm: a has no dimensions, expected [..., K]"),
    (lambda: ops.w8a8_gemm(A, B[0], ONE, B_SCALE), f"w8a8_gemm: b has shape [40], {WEIGHT}"),
    (lambda: ops.w8a8_gemm(A[:, :39], B, ONE, B_SCALE), "w8a8_gemm: a has K=39, but b has K=40"),
    (lambda: ops.w8a8_gemm(A, B, torch.ones(5), B_SCALE), "w8a8_gemm: a_scale has 5 elements, expected 1 or M=6"),
    (lambda: ops.w8a8_gemm(A, B, ONE, torch.ones(12)), "w8a8_gemm: b_scale has 12 elements, expected 1 or N=9"),
    (lambda: ops.w8a8_gemm(A, B, ONE.half(), B_SCALE), "w8a8_gemm: a_scale is float16, expected float32"),
    (lambda: ops.w8a8_gemm(A, B, ONE, B_SCALE.bfloat16()), "w8a8_gemm: b_scale is bfloat16, expected float32"),
    (lambda: ops.w8a8_gemm(A, B, ONE, B_SCALE, torch.ones(8)), "w8a8_gemm: bias has 8 elements, expected N=9"),
    (lambda: ops.w8a8_gemm(A, B, ONE, B_SCALE, torch.ones(9).int()), f"w8a8_gemm: bias is int32, {FLOAT}"),
    (
        lambda: ops.w8a8_gemm(A, B, ONE, B_SCALE, None, torch.float64),
        f"w8a8_gemm: out_dtype is float64, {FLOAT}",
    ),
    (
        lambda: ops.w8a8_gemm(A[:1, :1].expand(1, 131072), B[:1, :1].expand(1, 131072), ONE, ONE),
        "w8a8_gemm: K is 131072, and int32 sums of int8 products are exact only up to K=131071",
    ),
    (
        lambda: ops.w8a8_gemm(A, PACKED, ONE, torch.ones(65)),
        "w8a8_gemm: b_scale has 65 elements, expected one a column of the packed b, which has 1 to 64",
    ),
    (
        lambda: ops.w8a8_gemm(torch.ones(6, 65, dtype=torch.int8), PACKED, ONE, B_SCALE),
        "w8a8_gemm: a has K=65, but the packed b has K=1 to 64",
    ),
    (
        lambda: ops.w8a8_gemm(A, PACKED[:, :16], ONE, B_SCALE),
        f"w8a8_gemm: b has shape [1, 16, 64, 4], {WEIGHT}",
    ),
]

LINEAR_ERRORS: list[tuple[Call, str]] = [
    (lambda: ops.w8a8_linear(X.double(), B, B_SCALE), f"w8a8_linear: x is float64, {FLOAT}"),
    (lambda: ops.w8a8_linear(A, B, B_SCALE), f"w8a8_linear: x is int8, {FLOAT}"),
    (lambda: ops.w8a8_linear(X, X, B_SCALE), f"w8a8_linear: weight is float32, {EIGHT}"),
    (lambda: ops.w8a8_linear(X[:, :39], B, B_SCALE), "w8a8_linear: x has K=39, but weight has K=40"),
    (lambda: ops.w8a8_linear(X, B, torch.ones(12)), "w8a8_linear: weight_scale has 12 elements, expected 1 or N=9"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, torch.ones(8)), "w8a8_linear: bias has 8 elements, expected N=9"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, PER_ROW), "w8a8_linear: input_scale has 6 elements, expected 1"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, ONE.half()), "w8a8_linear: input_scale is float16, expected float32"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, ONE * 0), f"w8a8_linear: input_scale is 0, {POSITIVE}"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, smooth=PER_ROW), "w8a8_linear: smooth has 6 elements, expected K=40"),
    (
        lambda: ops.w8a8_linear(X, B, B_SCALE, out_dtype=torch.int8),
        f"w8a8_linear: out_dtype is int8, {FLOAT}",
    ),
    (
        lambda: ops.w8a8_linear(X, PACKED, ONE.expand(70)),
        "w8a8_linear: weight_scale has 70 elements, expected one a column of the packed weight, which has 1 to 64",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), [*QUANTIZE_ERRORS, *GEMM_ERRORS, *LINEAR_ERRORS])
def test_an_error_is_one_sentence_that_names_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert str(error.value).splitlines()[0] == sentence


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 63), (130, 577), (3, 2), (0, 5), (5, 0)])
def test_packing_and_back(n: int, k: int, dtype: torch.dtype) -> None:
    b = torch.randint(0, 256, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.uint8).view(dtype)
    packed = ops.prepack_weight(b)
    assert packed.dtype == dtype
    assert packed.shape == (-(-n // 64), -(-k // 64) * 16 + 1, 64, 4)
    # As bytes: a NaN of float8 has a sign.
    assert torch.equal(packed.view(torch.uint8), reference.prepack_weight(b).view(torch.uint8))
    assert torch.equal(ops.unpack_weight(packed, n, k).view(torch.uint8), b.view(torch.uint8))
    for column, row in ((0, 0), (n // 2, k // 3), (n - 1, k - 1)):
        if n and k:
            there = packed.view(torch.uint8)[column // 64, row // 4, column % 64, row % 4]
            assert there == b.view(torch.uint8)[column, row]
    if dtype == torch.int8 and n:
        sums = packed[:, -1].contiguous().view(torch.int32).flatten()
        assert torch.equal(sums[:n], b.sum(1, dtype=torch.int32))
        assert not sums[n:].any()


# --- what runs here -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_info_names_a_backend_for_every_op(isa: str) -> None:
    with cpu_isa(isa):
        rows = ops.info()
        assert ops.cpu_isa() == isa
    for device in ("cpu", "cuda"):
        names = {row.op.partition(",")[0] for row in rows if row.device == device}
        assert names == public_ops()
    products = {row.op: row for row in rows if row.device == "cpu"}
    fp8 = {"avx512vnni": "avx512", "avxvnni": "avx2"}
    assert products["w8a8_linear, fp8"].backend == fp8.get(isa, isa)
    isas = ops.cpu_isas()
    for better in isas[: isas.index(isa)]:
        assert better in products["w8a8_linear, int8"].reason
    assert all(row.reason for row in rows if row.device == "cuda" and row.backend == "none")


def test_unknown_instruction_sets_are_refused() -> None:
    with pytest.raises(RuntimeError, match="sse9"):
        torch.ops.sq._set_cpu_isa("sse9")
    with pytest.raises(RuntimeError, match="sse9"):
        torch.ops.sq.cpu_isa_why_not("sse9")
    with pytest.raises(RuntimeError, match="nothing"):
        torch.ops.sq.cpu_kernel("nothing")


@pytest.mark.parametrize(
    ("isa", "output"),
    [
        ("portable", "portable SMOOTHQUANT_CPU_ISA=portable"),
        ("sse9", f"SMOOTHQUANT_CPU_ISA is 'sse9', expected one of {', '.join(ops.cpu_isas())}"),
    ],
)
def test_the_environment_forces_an_instruction_set(isa: str, output: str) -> None:
    program = (
        "from smoothquant_ext import ops\n"
        "try: print(*ops.info()[0][2:])\n"
        "except RuntimeError as error: print(str(error).splitlines()[0])"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "SMOOTHQUANT_CPU_ISA": isa, "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == output, result.stderr


def test_a_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"_C\.so is missing; run 'pip install \.'"):
        library.load(tmp_path / "_C.so")


def test_a_library_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "_C_cuda.so").write_bytes(b"not a shared object")
    with pytest.raises(ImportError, match=r"cannot load _C_cuda\.so: .*(invalid ELF header|file too short)"):
        library.load(tmp_path / "_C_cuda.so")


def test_float8_kinds_are_told_apart() -> None:
    x = torch.full((1, 1), 300.0)
    one = torch.ones(1)
    values = {dtype: float(ops.quantize_static(x, one, dtype).float()) for dtype in FLOAT8}
    assert values == {torch.float8_e4m3fn: 288.0, torch.float8_e5m2: 320.0}
