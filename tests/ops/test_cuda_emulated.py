"""The CUDA ops without a GPU: their own host code and kernels, compiled as plain C++, against the oracle.

Everything is what a GPU runs but the matrix products of cuBLASLt, which are loops here that insist on what the library
insists on (alignment, types, architectures). See tests/native/emulation/emulate.h.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from emulated_ops import ARCHS, OPS, check_fp8, lists, ops_there, run_there, same, weight
from emulation import ROOT
from op_cases import CASES, OpCase, Problem, call, expected_of
from op_testing import EIGHT_BIT, FLOAT8, FLOATS, randn, random_float8, random_int8, scales
from torch_attention import torch_attention

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.declare import DECLARED

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="module", autouse=True)
def _device() -> Iterator[None]:
    with ops_there():
        yield


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each architecture in turn."""
    value: int = request.param
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(value))
    return value


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One architecture, for what does not depend on it."""
    monkeypatch.setenv("SQ_EMULATED_ARCH", "90")


# --- producers ------------------------------------------------------------------------------------------------------

SHORT = [((0,), 8), ((1,), 1), ((3,), 15), ((2,), 16), ((3,), 64), ((2,), 577), ((2, 2), 100)]
SHORT += [((2,), 96), ((3,), 384), ((2,), 768)]  # which blocks of 32, 128 and 256 divide
# The last ones are too long for shared memory, and the very last for registers; 4096 and 33024 can be rotated.
LONG = [((2,), 4096), ((1,), 8200), ((1,), 16392), ((1,), 26000), ((1,), 33024)]
FILLING = [11528, 12032, 12040, 12152, 12288]  # fp32 rows about as long as a block's memory that need not be asked for
PRODUCERS = [CASES[name] for name in OPS if DECLARED[name].cpu != "gemm"]
LAYERS = [CASES[name] for name in OPS if DECLARED[name].cpu == "gemm"]


def check(case: OpCase, problem: Problem) -> None:
    """Every way to call an op, against the oracle."""
    for arguments in case.make(problem):
        expected = expected_of(case, arguments, attend=partial(run_there, torch_attention))
        case.check(call(case.op, arguments), expected, arguments, (problem, list(arguments)))


@pytest.mark.parametrize("case", PRODUCERS, ids=lambda case: case.name)
@pytest.mark.usefixtures("hopper")
def test_producers_equal_the_oracle(case: OpCase) -> None:
    for shape in SHORT:
        for problem in case.problems(*shape, packs=False):
            check(case, problem)
    for turn, shape in enumerate(LONG):
        check(case, Problem(*shape, dtype=FLOATS[turn % 3], packs=False))


@pytest.mark.parametrize("columns", FILLING)
@pytest.mark.parametrize("case", PRODUCERS, ids=lambda case: case.name)
@pytest.mark.usefixtures("hopper")
def test_rows_that_fill_shared_memory(case: OpCase, columns: int) -> None:
    """What a kernel declares counts too: see emulated_runtime.cpp."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = next(iter(case.make(Problem((1,), columns, dtype=dtype, packs=False))))
        case.check(call(case.op, arguments), expected_of(case, arguments), arguments, (columns, dtype))


@pytest.mark.parametrize("case", PRODUCERS, ids=lambda case: case.name)
@pytest.mark.usefixtures("hopper")
def test_rows_that_are_not_finite(case: OpCase) -> None:
    for eight_bit in case.eight_bit:
        for arguments in case.make(Problem((5,), 577, eight_bit=eight_bit, packs=False)):
            x = arguments[case.rows[0]]
            x[1, 7], x[2, 576], x[3] = torch.nan, torch.inf, 0.0
            case.check(call(case.op, arguments), expected_of(case, arguments), arguments, list(arguments))


@pytest.mark.usefixtures("hopper")
def test_inputs_that_are_not_contiguous() -> None:
    x, w = randn(64, 9).t(), randn(128)[::2]
    plain, plain_w = x.contiguous(), w.contiguous()
    same(ops.quantize_per_token(x, torch.int8, w.abs() + 1), reference.quantize_per_token(x, torch.int8, w.abs() + 1))
    same(
        ops.rms_norm_quantize(x, w, 1e-5, torch.int8, x), ops.rms_norm_quantize(plain, plain_w, 1e-5, torch.int8, plain)
    )
    same(ops.silu_mul_quantize(x, x, torch.int8), reference.silu_mul_quantize(plain, plain, torch.int8))
    b = random_int8(64, 12).t()
    q, scale = reference.quantize_per_token(x, torch.int8)
    same(
        ops.w8a8_gemm(q, b, scale, w[:12].abs(), w[:12]),
        reference.w8a8_gemm(q, b.contiguous(), scale, plain_w[:12].abs(), plain_w[:12]),
    )


# --- products -------------------------------------------------------------------------------------------------------

PRODUCTS = [(0, 8, 16), (1, 33, 70), (3, 64, 640), (8, 16, 16), (9, 16, 32), (9, 17, 32), (20, 24, 48), (20, 24, 40)]
PRODUCTS += [(33, 32, 33), (300, 16, 16), (600, 48, 32), (12, 16, 0), (12, 0, 16)]


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_int8_products_equal_the_oracle(arch: int, m: int, n: int, k: int) -> None:
    a, b = random_int8(m, k), random_int8(n, k, seed=1)
    for turn, (a_scale, b_scale) in enumerate(((m, n), (1, n), (m, 1), (1, 1))):
        bias = (None, randn(n), randn(n, dtype=torch.bfloat16), randn(n, dtype=torch.float16))[turn]
        arguments = (a, b, scales(a_scale), scales(b_scale), bias, FLOATS[(turn + m) % 3])
        same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), (arch, m, n, k))


PAIRS = list(itertools.product(FLOAT8, FLOAT8))


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_fp8_products_are_within_the_bound(arch: int, m: int, n: int, k: int) -> None:
    for turn, (a_scale, b_scale) in enumerate(((m, n), (m, n), (1, n), (1, 1))):
        # Each shape in all pairs of types; each pair, over the shapes, in all turns.
        a_dtype, b_dtype = PAIRS[(turn + PRODUCTS.index((m, n, k))) % 4]
        a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
        bias = (None, randn(n, dtype=torch.bfloat16), randn(n), randn(n, dtype=torch.float16))[turn]
        out_dtype = (torch.float32, torch.bfloat16)[turn % 2]
        arguments = (a, b, scales(a_scale), scales(b_scale, seed=1), bias)
        y = ops.w8a8_gemm(*arguments, out_dtype)
        check_fp8(y, *arguments)


@pytest.mark.parametrize("refused", ["outer", "matmul", "all"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_without_an_algorithm_another_way_is_taken(
    arch: int, dtype: torch.dtype, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQ_EMULATED_REFUSES", refused)
    a, a_scale = reference.quantize_per_token(randn(20, 64), dtype)
    b, b_scale = reference.quantize_per_token(randn(32, 64, seed=1), dtype)
    y = ops.w8a8_gemm(a, b, a_scale, b_scale, None, torch.float32)
    if dtype == torch.int8:
        same(y, reference.w8a8_gemm(a, b, a_scale, b_scale, None, torch.float32), arch)
    else:
        check_fp8(y, a, b, a_scale, b_scale, None)


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_memory_that_is_not_aligned(arch: int, dtype: torch.dtype, offset: int) -> None:
    a, b = (random_int8(rows * 32 + offset, seed=rows)[offset:].view(rows, 32) for rows in (20, 16))
    a_scale, b_scale = torch.ones(20 + offset)[offset:], torch.ones(16)
    if dtype != torch.int8:  # without the codes of NaN and infinity
        a, b = ((t & 0x3B).view(dtype) for t in (a, b))
    y = ops.w8a8_gemm(a, b, a_scale, b_scale, None, torch.float32)
    if dtype == torch.int8:
        same(y, reference.w8a8_gemm(a, b, a_scale, b_scale, None, torch.float32), arch)
    else:
        check_fp8(y, a, b, a_scale, b_scale, None)


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layers_equal_the_oracle(arch: int, case: OpCase) -> None:
    """In FP8 too: it takes the emulated products as they are, see ``expected_of``."""
    shapes = ((0,), 64, 32), ((9,), 70, 33), ((1,), 64, 32), ((20,), 64, 32), ((2,), 32, 121)  # the last one rotates
    for turn, shape in enumerate(shapes):
        for eight_bit in EIGHT_BIT[: 1 + turn // 2 % 2]:
            check(case, Problem(*shape, FLOATS[turn % 3], eight_bit, packs=False))


def test_layers_in_pieces_of_rows(arch: int) -> None:
    x = randn(300, 64, dtype=torch.bfloat16)
    x[2, 3], x[3], x[299, 5] = torch.nan, 0.0, torch.inf
    layers = lists(weight(48, 64), weight(48, 64, seed=2), weight(32, 48, seed=3))
    same(ops.w8a8_mlp(x, *layers), reference.w8a8_mlp(x, *layers), arch)
    single = (x, *weight(32, 64), randn(32), None, randn(64, seed=4).abs() + 0.2, torch.float16)
    same(ops.w8a8_linear(*single), reference.w8a8_linear(*single), arch)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.usefixtures("hopper")
def test_every_activation(activation: str) -> None:
    x, one = randn(20, 64, dtype=torch.bfloat16), torch.tensor([0.02])
    gate, up, down = weight(48, 64), weight(48, 64, seed=2), weight(32, 48, seed=3)
    for layers, input_scale in (((gate, up, down), [one, one]), ((gate, down), [None, one])):
        mlp = (x, *lists(*layers), None, input_scale, activation)
        same(ops.w8a8_mlp(*mlp), reference.w8a8_mlp(*mlp), activation)


# --- errors ---------------------------------------------------------------------------------------------------------

X, B, S, ONE = torch.ones(3, 40), torch.ones(9, 40, dtype=torch.int8), torch.ones(9), torch.ones(1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ops.quantize_per_token(X.int(), torch.int8), "quantize_per_token: x is int32"),
        (lambda: ops.quantize_static(X, S, torch.int8), "quantize_static: scale has 9 elements, expected 1"),
        (lambda: ops.rms_norm(X, S, 1e-5), "rms_norm: weight has 9 elements, expected K=40"),
        (lambda: ops.silu_mul_quantize(X, X[:2], torch.int8), r"gate has shape \[3, 40\] and up \[2, 40\]"),
        (lambda: ops.gelu_quantize(X, torch.int8, None, "erf"), "approximate is 'erf', expected none or tanh"),
        (lambda: ops.rms_norm_quantize(X, X[0], 1e-5, torch.int8, None, S), "scale has 9 elements, expected 1"),
        (lambda: ops.w8a8_gemm(B, B, ONE, S[:8]), "w8a8_gemm: b_scale has 8 elements, expected 1 or N=9"),
        (lambda: ops.w8a8_linear(X, B, S, None, S), "w8a8_linear: input_scale has 9 elements, expected 1"),
        (lambda: ops.w8a8_linear_group(X, [B], [S], [S, S]), "w8a8_linear_group: bias has 2 elements, expected 0 or 1"),
        (lambda: ops.quantize_per_token(X, torch.int8, None, 16), "quantize_per_token: rotate is 16, expected 0 or"),
        (lambda: ops.quantize_static(X, ONE, torch.int8, 16), "quantize_static: rotate is 16, expected 0 or"),
        (lambda: ops.relu_quantize(X, torch.int8, None, 4), "relu_quantize: rotate is 4, expected 0 or"),
        (lambda: ops.w8a8_linear(X, B, S, rotate=512), "w8a8_linear: rotate is 512, expected 0 or"),
        (lambda: ops.w8a8_linear_group(X, [B], [S], rotate=16), "w8a8_linear_group: rotate is 16, expected 0 or"),
        (lambda: ops.w8a8_mlp(X, [B, B], [S, S]), r"act\(first\) has K=9, but weight\[1\] \(down\) has K=40"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_errors_are_those_of_the_cpu(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
