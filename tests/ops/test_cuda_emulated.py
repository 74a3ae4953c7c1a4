"""The CUDA ops without a GPU: their own host code and kernels, compiled as plain C++, against the oracle.

Everything is what a GPU runs but the matrix products of cuBLASLt, which are loops here that insist on what the library
insists on (alignment, types, architectures), and the tensors' device. See tests/native/emulation/emulate.h.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import EIGHT_BIT, FLOAT8, FLOATS, assert_same_bits, randn, random_float8, random_int8
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops import backends

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(f"csrc/cuda/ops/{name}.cpp" for name in ("quantize", "norm_activation", "gemm", "linear")),
    *(f"csrc/cuda/compute/{name}.cpp" for name in ("product", "quantize", "tile_product")),
    *(f"csrc/cuda/kernels/{name}.cu" for name in ("quantize", "norm", "activate", "gemm", "mma", "wgmma")),
    "tests/native/emulation/emulated_device.cpp",
]
OPS = [op.partition(",")[0] for op, _, families in backends._OPS if families]
ARCHS = (80, 89, 90, 100)
EPS = torch.finfo(torch.float32).eps
LIBRARY = torch.library.Library("sq_emulated", "DEF")  # its ops are there as long as it is

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, compiled with the project's own flags; products in pieces of 256 rows."""
    folder = tmp_path_factory.mktemp("emulated")
    torch_dir = Path(torch.__file__).parent
    lines = (ROOT / "csrc" / "flags.txt").read_text().splitlines()
    flags = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("cxx", "torch"))]
    flags += ["-O1", "-fPIC", "-DUSE_CUDA", "-DSQ_MOST_SUM_BYTES=1", "-include", "tests/native/emulation/emulate.h"]
    flags += ["-Itests/native/emulation/stub", "-Itests", "-Icsrc", "-isystem", str(torch_dir / "include")]

    def compile_one(source: str) -> str:
        target = str(folder / f"{Path(source).name}.o")
        subprocess.run(["c++", "-x", "c++", *flags, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / "libemulated.so"
    subprocess.run(["c++", "-shared", *objects, "-o", library, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"], check=True)
    return library


@pytest.fixture(scope="session")
def registered(emulated: Path) -> Any:
    """``torch.ops.sq_emulated``, with the schemas of ``torch.ops.sq``."""
    for op in set(OPS):
        LIBRARY.define(str(getattr(torch.ops.sq, op).default._schema).removeprefix("sq::"))
    torch.ops.load_library(emulated)
    return torch.ops.sq_emulated


def call_instead(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the emulated op behind every wrapper in ``ops``."""
    for op in set(OPS):
        monkeypatch.setattr(f"{getattr(ops, op).__module__}._{op}", getattr(registered, op).default)


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, registered: Any) -> int:
    """Makes every wrapper in ``ops`` call the emulated op, on each architecture in turn."""
    value: int = request.param
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(value))
    call_instead(registered, monkeypatch)
    return value


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, registered: Any) -> None:
    """The same on one architecture, for what does not depend on it."""
    monkeypatch.setenv("SQ_EMULATED_ARCH", "90")
    call_instead(registered, monkeypatch)


def same(actual: Any, expected: Any, what: object = "") -> None:
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected, what)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other, what)


def scales(count: int, seed: int = 0) -> Tensor:
    return randn(count, seed=seed).abs() * 0.01 + 1e-4


# --- producers ------------------------------------------------------------------------------------------------------

SHAPES = [(0, 8), (1, 1), (3, 15), (2, 16), (3, 64), (2, 577), (2, 2, 100), (2, 4096), (1, 8200), (1, 16392)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.usefixtures("hopper")
def test_producers_equal_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, up, w = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[-1], seed=2)
    if x.numel() > 60:
        x[-1].view(-1)[7] = torch.nan
    one, smooth = torch.tensor([0.03]), randn(shape[-1], seed=3).abs() + 0.1
    for eight_bit in EIGHT_BIT if shape[-1] < 1000 else EIGHT_BIT[:1]:
        for name, arguments in (
            ("quantize_per_token", (x, eight_bit)),
            ("quantize_per_token", (x, eight_bit, smooth)),
            ("quantize_static", (x, one, eight_bit)),
            ("rms_norm_quantize", (x, w.to(dtype), 1e-5, eight_bit, None, None, 1.0)),
            ("rms_norm_quantize", (x, w, 1e-5, eight_bit, up, one)),
            ("layer_norm_quantize", (x, w, None, 1e-5, eight_bit, up)),
            ("layer_norm_quantize", (x, w, w.half(), 1e-5, eight_bit)),
            ("silu_mul_quantize", (x, up, eight_bit)),
            ("gelu_mul_quantize", (x, up, eight_bit, one, "tanh")),
            ("gelu_quantize", (x, eight_bit, None, "none")),
            ("relu_quantize", (x, eight_bit, one)),
        ):
            same(getattr(ops, name)(*arguments), getattr(reference, name)(*arguments), (name, shape, dtype, eight_bit))
    same(ops.rms_norm(x, w, 1e-5, 1.0), reference.rms_norm(x, w, 1e-5, 1.0))


@pytest.mark.usefixtures("hopper")
def test_rows_that_are_too_long_for_shared_memory() -> None:
    gate, up = randn(1, 26000, dtype=torch.bfloat16), randn(1, 26000, dtype=torch.bfloat16, seed=1)
    same(ops.silu_mul_quantize(gate, up, torch.int8), reference.silu_mul_quantize(gate, up, torch.int8))


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


@pytest.mark.parametrize("b_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("a_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_fp8_products_are_within_the_bound(
    arch: int, m: int, n: int, k: int, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> None:
    a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
    for turn, (a_scale, b_scale) in enumerate(((m, n), (m, n), (1, n), (1, 1))):
        bias = (None, randn(n, dtype=torch.bfloat16), randn(n), randn(n, dtype=torch.float16))[turn]
        out_dtype = (torch.float32, torch.bfloat16)[turn % 2]
        arguments = (a, b, scales(a_scale), scales(b_scale, seed=1), bias)
        y = ops.w8a8_gemm(*arguments, out_dtype)
        check_fp8(y, *arguments)


def check_fp8(y: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    """K roundings of fp32 sums, four of single operations, and the cast: see test_ops_fp8."""
    scale = a_scale.double().reshape(-1, 1) * b_scale.double().reshape(-1)
    exact = (a.double() @ b.double().T) * scale
    magnitude = (a.double().abs() @ b.double().abs().T) * scale
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = (a.shape[-1] + 4) * EPS * magnitude
    bound += torch.finfo(y.dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(y.dtype).tiny
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("refused", ["outer", "all"])
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


# --- our own tensor-core products -----------------------------------------------------------------------------------

OWN = [*(("mma", arch) for arch in ARCHS), ("wgmma", 90), ("auto", 90)]
TILES = [(0, 16, 16), (1, 33, 16), (9, 16, 32), (130, 17, 208), (20, 136, 1040), (300, 16, 16), (12, 0, 16)]
TILES += [(5, 40, 4096)]  # for which wgmma swaps operands and splits k: see gemm_config_test.cpp


@pytest.fixture(params=OWN, ids=lambda own: f"{own[0]} on {own[1]}")
def own(request: pytest.FixtureRequest, hopper: None, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    """Asks for one of them, on each architecture that has it."""
    family, arch = request.param
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", family)
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(arch))
    return family, arch


@pytest.mark.parametrize(("m", "n", "k"), TILES)
def test_own_int8_products_equal_the_oracle(own: tuple[str, int], m: int, n: int, k: int) -> None:
    a, b = random_int8(m, k), random_int8(n, k, seed=1)
    bias = (None, randn(n), randn(n, dtype=torch.bfloat16))[m % 3]
    arguments = (a, b, scales(m if n % 2 else 1), scales(n), bias, FLOATS[(m + n) % 3])
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), (own, m, n, k))


@pytest.mark.parametrize("k", [208, 4096])
@pytest.mark.parametrize("b_dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("a_dtype", FLOAT8, ids=str)
def test_own_fp8_products_are_within_the_bound(
    own: tuple[str, int], a_dtype: torch.dtype, b_dtype: torch.dtype, k: int
) -> None:
    family, arch = own
    a, b = random_float8(20, k, dtype=a_dtype), random_float8(33, k, dtype=b_dtype, seed=1)
    arguments = (a, b, scales(20), scales(33, seed=1), randn(33))
    if arch < 89:
        with pytest.raises(RuntimeError, match=f"SMOOTHQUANT_CUDA_GEMM is {family}, but compute capability 8.0 has no"):
            ops.w8a8_gemm(*arguments, torch.bfloat16)
        return
    check_fp8(ops.w8a8_gemm(*arguments, torch.bfloat16), *arguments)


@pytest.mark.usefixtures("own")
def test_layers_on_our_own_products_equal_the_oracle() -> None:
    x = randn(20, 64, dtype=torch.bfloat16)
    x[2, 3], x[3], x[4, 5] = torch.nan, 0.0, torch.inf
    single = (x, *weight(32, 64), randn(32), None, randn(64, seed=4).abs() + 0.2, torch.float16)
    same(ops.w8a8_linear(*single), reference.w8a8_linear(*single))
    operands = (*weight(48, 64), *weight(32, 48, seed=3), *weight(48, 64, seed=2))
    same(ops.w8a8_mlp(x, *operands), reference.w8a8_mlp(x, *operands))


@pytest.mark.parametrize(
    ("request_", "arch", "archs", "k", "sentence"),
    [
        ("mma", 90, "", 40, "is mma, but K is 40, expected a positive multiple of 16"),
        ("mma", 90, "", 0, "is mma, but K is 0, expected"),
        (
            "wgmma",
            80,
            "",
            64,
            "is wgmma, but wgmma is an instruction of compute capability 9.0, and this GPU is of 8.0",
        ),
        ("wgmma", 90, "80 90", 64, "is wgmma, but wgmma needs code for 90a"),
        ("auto", 90, "", 8, "is auto, but K is 8, expected a positive multiple of 16$"),
        ("cutlass", 90, "", 64, "is 'cutlass', expected library, mma, wgmma or auto"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_what_our_own_products_refuse(
    request_: str, arch: int, archs: str, k: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", request_)
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(arch))
    monkeypatch.setenv("SQ_EMULATED_ARCHS", archs)
    with pytest.raises(RuntimeError, match=f"w8a8_gemm: SMOOTHQUANT_CUDA_GEMM {sentence}"):
        ops.w8a8_gemm(random_int8(20, k), random_int8(16, k), ONE, ONE)


@pytest.mark.usefixtures("own")
def test_our_own_products_refuse_memory_that_is_not_aligned() -> None:
    a, b = random_int8(20 * 32 + 8)[8:].view(20, 32), random_int8(16, 32)
    with pytest.raises(RuntimeError, match="an operand does not begin at a multiple of 16 bytes"):
        ops.w8a8_gemm(a, b, ONE, ONE)


# --- layers ---------------------------------------------------------------------------------------------------------


def weight(n: int, k: int, seed: int = 1, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return reference.quantize_per_token(randn(n, k, seed=seed), dtype)


@pytest.mark.parametrize("m", [0, 1, 20, 300])
@pytest.mark.parametrize("is_static", [False, True], ids=["per token", "static"])
def test_layers_equal_the_oracle(arch: int, m: int, is_static: bool) -> None:
    x = randn(m, 64, dtype=torch.bfloat16)
    if m > 4:
        x[2, 3], x[3], x[4, 5] = torch.nan, 0.0, torch.inf
    a_scale = torch.tensor([0.02]) if is_static else None
    smooth = randn(64, seed=4).abs() + 0.2
    single = (x, *weight(32, 64), randn(32), a_scale, smooth, torch.float16)
    same(ops.w8a8_linear(*single), reference.w8a8_linear(*single), arch)
    b, b_scale = zip(weight(32, 64), weight(15, 64, seed=2), strict=True)
    for bias in ([], [randn(32), randn(15)]):
        several = (x, b, b_scale, bias, a_scale)
        same(ops.w8a8_linears(*several), reference.w8a8_linears(*several), arch)
    for activation in reference.ACTIVATIONS:
        gate, up, down = weight(48, 64), weight(48, 64, seed=2), weight(32, 48, seed=3)
        for operands in ((*gate, *down, *up, randn(48), randn(48), randn(32)), (*gate, *down)):
            operands = (*operands, *[None] * (9 - len(operands)), a_scale, a_scale, activation)
            same(ops.w8a8_mlp(x, *operands), reference.w8a8_mlp(x, *operands), (arch, activation))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_an_fp8_mlp_is_made_of_the_single_ops(arch: int, dtype: torch.dtype) -> None:
    x = randn(20, 64, dtype=torch.bfloat16)
    gate, up, down = weight(48, 64, 1, dtype), weight(48, 64, 2, dtype), weight(32, 48, 3, dtype)
    q, scale = ops.silu_mul_quantize(ops.w8a8_linear(x, *gate), ops.w8a8_linear(x, *up), dtype)
    same(ops.w8a8_mlp(x, *gate, *down, *up), ops.w8a8_gemm(q, down[0], scale, down[1]), arch)


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
        (lambda: ops.rms_norm_quantize(X, X[0], 1e-5, torch.int8, None, S), "a_scale has 9 elements, expected 1"),
        (lambda: ops.w8a8_gemm(B, B, ONE, S[:8]), "w8a8_gemm: b_scale has 8 elements, expected 1 or N=9"),
        (lambda: ops.w8a8_linear(X, B, S, None, S), "w8a8_linear: a_scale has 9 elements, expected 1"),
        (lambda: ops.w8a8_linears(X, [B], [S], [S, S]), "w8a8_linears: bias has 2 tensors, but b has 1"),
        (lambda: ops.w8a8_mlp(X, B, S, B, S), r"act\(gate\) has K=9, but down has K=40"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_errors_are_those_of_the_cpu(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
