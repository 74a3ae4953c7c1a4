"""What torch and the user rely on besides the numbers: errors, schemas, fake kernels, torch.compile, packing, info."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import EIGHT_BIT, FLOAT8, ISAS, Call, assert_same_bits, cpu_isa, randn, random_int8
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from smoothquant_ext import ops, reference
from smoothquant_ext.ops import backends


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
    (lambda: ops.prepack_weight(X), f"prepack_weight: b is float32, {EIGHT}"),
    (lambda: ops.prepack_weight(A[0]), "prepack_weight: b has shape [40], expected [N, K] or [E, N, K]"),
    (lambda: ops.prepack_weight(PACKED), "prepack_weight: b has shape [1, 17, 64, 4], expected [N, K] or [E, N, K]"),
    (
        lambda: ops.prepack_weight(torch.ones(1, 133145, dtype=torch.int8)),
        "prepack_weight: K is 133145, and int32 sums of int8 products are exact only up to K=133144",
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
        lambda: ops.w8a8_gemm(A[:1, :1].expand(1, 133145), B[:1, :1].expand(1, 133145), ONE, ONE),
        "w8a8_gemm: K is 133145, and int32 sums of int8 products are exact only up to K=133144",
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
    (lambda: ops.w8a8_linear(X, X, B_SCALE), f"w8a8_linear: b is float32, {EIGHT}"),
    (lambda: ops.w8a8_linear(X[:, :39], B, B_SCALE), "w8a8_linear: x has K=39, but b has K=40"),
    (lambda: ops.w8a8_linear(X, B, torch.ones(12)), "w8a8_linear: b_scale has 12 elements, expected 1 or N=9"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, torch.ones(8)), "w8a8_linear: bias has 8 elements, expected N=9"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, PER_ROW), "w8a8_linear: a_scale has 6 elements, expected 1"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, ONE.half()), "w8a8_linear: a_scale is float16, expected float32"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, None, ONE * 0), f"w8a8_linear: a_scale is 0, {POSITIVE}"),
    (lambda: ops.w8a8_linear(X, B, B_SCALE, smooth=PER_ROW), "w8a8_linear: smooth has 6 elements, expected K=40"),
    (
        lambda: ops.w8a8_linear(X, B, B_SCALE, out_dtype=torch.int8),
        f"w8a8_linear: out_dtype is int8, {FLOAT}",
    ),
    (
        lambda: ops.w8a8_linear(X, PACKED, ONE.expand(70)),
        "w8a8_linear: b_scale has 70 elements, expected one a column of the packed b, which has 1 to 64",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), [*QUANTIZE_ERRORS, *GEMM_ERRORS, *LINEAR_ERRORS])
def test_an_error_is_one_sentence_that_names_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert str(error.value).splitlines()[0] == sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: ops.quantize_per_token(X, torch.int8, torch.ones(40, device="meta")),
            "quantize_per_token: smooth is on meta, but x is on cpu",
        ),
        (
            lambda: ops.quantize_static(X, ONE.to("meta"), torch.int8),
            "quantize_static: scale is on meta, but x is on cpu",
        ),
        (lambda: ops.w8a8_gemm(A, B.to("meta"), ONE, B_SCALE), "w8a8_gemm: b is on meta, but a is on cpu"),
        (lambda: ops.w8a8_gemm(A, B, ONE, B_SCALE.to("meta")), "w8a8_gemm: b_scale is on meta, but a is on cpu"),
        (lambda: ops.w8a8_linear(X.to("meta"), B, B_SCALE), "w8a8_linear: b is on cpu, but x is on meta"),
    ],
)
def test_mixed_devices(call: Call, sentence: str) -> None:
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


# --- torch ----------------------------------------------------------------------------------------------------------

# test_schema compares inputs with allclose, which torch lacks for float8 on the CPU.
FLOAT8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL_CHECKS = ("test_schema", *FLOAT8_CHECKS)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    checks = ALL_CHECKS if dtype == torch.int8 else FLOAT8_CHECKS
    sq = torch.ops.sq
    x, smooth, bias = randn(2, 3, 70, dtype=torch.bfloat16), randn(70).abs() + 1, randn(9)
    b, b_scale = weight(9, 70, dtype)
    a, a_scale = reference.quantize_per_token(x, dtype)
    cases: list[tuple[object, tuple[object, ...]]] = [
        (sq.prepack_weight, (b,)),
        (sq.w8a8_gemm, (a, b, a_scale, b_scale)),
        (sq.w8a8_gemm, (a, ops.prepack_weight(b), a_scale, b_scale, bias, torch.float32)),
        (sq.w8a8_linear, (x, b, b_scale)),
        (sq.w8a8_linear, (x, ops.prepack_weight(b), b_scale, bias, torch.ones(1), smooth, torch.float16)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op.default, arguments, test_utils=checks)  # type: ignore[attr-defined]
    # Their outputs are float8.
    for op, arguments in (
        (sq.quantize_per_token, (x, dtype)),
        (sq.quantize_per_token, (x, dtype, smooth)),
        (sq.quantize_static, (x, torch.ones(1), dtype)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=checks)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_compile_makes_one_graph_for_every_batch_size(is_packed: bool, dtype: torch.dtype) -> None:
    b, b_scale = weight(9, 70, dtype)
    w = ops.prepack_weight(b) if is_packed else b
    bias = randn(9)

    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, scale = ops.quantize_per_token(x, dtype)
        static = ops.quantize_static(x, torch.ones(1), dtype)
        y = ops.w8a8_linear(x, w, b_scale, bias)
        return y + 1, ops.w8a8_gemm(q, w, scale, b_scale), static.float()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=True)
    for batch, tokens in ((5, 3), (7, 8), (11, 2)):  # the first ones unlike every size of the weights
        x = randn(batch, tokens, 70, seed=batch)
        for actual, expected in zip(compiled(x), forward(x), strict=True):
            assert_same_bits(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_meta_tensors_give_shapes(dtype: torch.dtype) -> None:
    x = torch.empty(2, 3, 70, device="meta", dtype=torch.float16)
    b, b_scale = torch.empty(130, 70, device="meta", dtype=dtype), torch.empty(130, 1, device="meta")
    packed = ops.prepack_weight(b)
    assert (packed.shape, packed.dtype) == ((3, 33, 64, 4), dtype)
    q, scale = ops.quantize_per_token(x, dtype)
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == (x.shape, dtype, (2, 3), torch.float32)
    for w in (b, packed):
        y = ops.w8a8_linear(x, w, b_scale)
        assert (y.shape, y.dtype) == ((2, 3, 130), torch.float16)
        y = ops.w8a8_gemm(q, w, scale, b_scale)
        assert (y.shape, y.dtype) == ((2, 3, 130), torch.bfloat16)


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_results_are_where_the_inputs_are(dtype: torch.dtype) -> None:
    """Of fake tensors on a GPU, which need none: what ``torch.compile`` traces there."""
    with FakeTensorMode():
        x = torch.empty(3, 70, device="cuda", dtype=torch.bfloat16)
        b, b_scale, w = (torch.empty(size, device="cuda") for size in ((130, 70), (130, 1), (70,)))
        b, down, down_scale = b.to(dtype), torch.empty(9, 130, device="cuda").to(dtype), torch.empty(9, device="cuda")
        results = [
            *ops.quantize_per_token(x, dtype),
            ops.quantize_static(x, w.new_empty(1), dtype),
            *ops.rms_norm_quantize(x, w, 1e-5, dtype, x),
            *ops.layer_norm_quantize(x, w, w, 1e-5, dtype),
            *ops.silu_mul_quantize(x, x, dtype),
            *ops.gelu_quantize(x, dtype),
            ops.rms_norm(x, w, 1e-5),
            ops.w8a8_linear(x, b, b_scale),
            *ops.w8a8_linears(x, [b, b], [b_scale, b_scale]),
            ops.w8a8_gemm(x.to(dtype), b, w.new_empty(3), b_scale),
            ops.w8a8_mlp(x, b, b_scale, down, down_scale, b, b_scale),
        ]
        assert {result.device.type for result in results} == {"cuda"}
        with pytest.raises(RuntimeError, match="b_scale is on cpu, but x is on cuda"):
            ops.w8a8_linear(x, b, torch.empty(130))


# --- what runs here -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_info_names_a_backend_for_every_op(isa: str) -> None:
    with cpu_isa(isa):
        rows = ops.info()
        assert ops.cpu_isa() == isa
    for device in ("cpu", "cuda"):
        names = {row.op.partition(",")[0] for row in rows if row.device == device}
        defined = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sq::")}
        assert names == {name for name in defined if not name.startswith(("_", "cpu_"))}
    products = {row.op: row for row in rows if row.device == "cpu"}
    fp8 = {"avx512vnni": "avx512", "avxvnni": "avx2"}
    assert products["w8a8_linear, fp8"].backend == fp8.get(isa, isa)
    for better in ops.CPU_ISAS[: ops.CPU_ISAS.index(isa)]:
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
        ("sse9", "SMOOTHQUANT_CPU_ISA is 'sse9', expected one of portable, avx2, avxvnni, avx512vnni, avx512bf16, amx"),
    ],
)
def test_the_environment_forces_an_instruction_set(isa: str, output: str) -> None:
    program = (
        "from smoothquant_ext import ops\n"
        "try: print(ops.info()[5].backend, ops.info()[5].reason)\n"
        "except RuntimeError as error: print(str(error).splitlines()[0])"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "SMOOTHQUANT_CPU_ISA": isa, "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == output, result.stderr


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    with pytest.raises(ImportError, match=r"_C\.so is missing; run 'pip install \.'"):
        backends._load_library("_C.so")


def test_a_library_that_cannot_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops" / "backends.py"))
    (tmp_path / "_C_cuda.so").write_bytes(b"not a shared object")
    with pytest.raises(ImportError, match=r"cannot load _C_cuda\.so: .*(invalid ELF header|file too short)"):
        backends._load_library("_C_cuda.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "cannot load _C_cuda.so" in backends._load_cuda()


def test_float8_kinds_are_told_apart() -> None:
    x = torch.full((1, 1), 300.0)
    one = torch.ones(1)
    values = {dtype: float(ops.quantize_static(x, one, dtype).float()) for dtype in FLOAT8}
    assert values == {torch.float8_e4m3fn: 288.0, torch.float8_e5m2: 320.0}
