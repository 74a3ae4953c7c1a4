"""The CUDA ops without a GPU: their own host code and kernels, compiled as plain C++, against the oracle.

Everything is what a GPU runs but the matrix products of cuBLASLt, which are loops here that insist on what the library
insists on (alignment, types, architectures), and the tensors' device. See tests/native/emulation/emulate.h.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from emulation import ROOT, emulated_library
from op_cases import CASES, OpCase, Problem, call, expected_of
from op_testing import EIGHT_BIT, FLOAT8, FLOATS, assert_same_bits, randn, random_float8, random_int8, scales, threads
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.declare import DECLARED

OPS = [name for name, declaration in DECLARED.items() if declaration.cuda]
SETUP = ["_cuda_archs", "_set_cuda_ways", "_cuda_way", "_cuda_warm_up"]
ARCHS = (80, 89, 90, 100)
EPS = torch.finfo(torch.float32).eps
LIBRARY = torch.library.Library("sq_emulated", "DEF")  # its ops are there as long as it is

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(scope="session")
def registered() -> Any:
    """``torch.ops.sq_emulated``, with the schemas of ``torch.ops.sq``."""
    for op in [*OPS, *SETUP]:
        LIBRARY.define(str(getattr(torch.ops.sq, op).default._schema).removeprefix("sq::"))
    torch.ops.load_library(emulated_library())
    return torch.ops.sq_emulated


def call_instead(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the emulated ops into ``ops``."""
    for op in OPS:
        monkeypatch.setattr(ops, op, getattr(registered, op).default)


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, registered: Any) -> int:
    """Puts the emulated ops into ``ops``, on each architecture in turn."""
    value: int = request.param
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(value))
    call_instead(registered, monkeypatch)
    return value


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, registered: Any) -> None:
    """The same on one architecture, for what does not depend on it."""
    monkeypatch.setenv("SQ_EMULATED_ARCH", "90")
    call_instead(registered, monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The emulation has one, and threads of the oracle would only wait for one another."""
    with threads(1):
        yield


def same(actual: Any, expected: Any, what: object = "") -> None:
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected, what)
        return
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other, what)


# --- producers ------------------------------------------------------------------------------------------------------

SHORT = [((0,), 8), ((1,), 1), ((3,), 15), ((2,), 16), ((3,), 64), ((2,), 577), ((2, 2), 100)]
LONG = [((2,), 4096), ((1,), 8200), ((1,), 16392), ((1,), 26000)]  # the last one is too long for shared memory
FILLING = [11528, 12032, 12040, 12152, 12288]  # fp32 rows about as long as a block's memory that need not be asked for
PRODUCERS = [CASES[name] for name in OPS if "gemm" not in DECLARED[name].cuda]
LAYERS = [CASES[name] for name in OPS if "gemm" in DECLARED[name].cuda]


def check(case: OpCase, problem: Problem) -> None:
    """Every way to call an op, against the oracle."""
    for arguments in case.make(problem):
        case.check(call(case.op, arguments), expected_of(case, arguments), arguments, (problem, list(arguments)))


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


def fp8_product(
    m: int, n: int, k: int, a_dtype: torch.dtype, b_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b = random_float8(m, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
    return a, b, scales(m), scales(n, seed=1), randn(n)


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


def exact_fp8(
    dtype: torch.dtype, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The exact result and its bound: K roundings of fp32 sums, four of single operations, and the cast; see test_ops_fp8."""
    scale = a_scale.double().reshape(-1, 1) * b_scale.double().reshape(-1)
    exact = (a.double() @ b.double().T) * scale
    magnitude = (a.double().abs() @ b.double().abs().T) * scale
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    bound = (a.shape[-1] + 4) * EPS * magnitude
    return exact, bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).tiny


def check_fp8(y: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> None:
    exact, bound = exact_fp8(y.dtype, a, b, a_scale, b_scale, bias)
    assert bool(((y.double() - exact).abs() <= bound).all())


def at_16_bytes(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements behind a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    first = -room.data_ptr() % 16 // room.element_size() + offset
    return room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


OUTER_PAIRS = [pair for pair in PAIRS if pair != (torch.float8_e5m2, torch.float8_e5m2)]


@pytest.mark.parametrize("way", ["library", "library_fast"])
@pytest.mark.parametrize("rows", [1, 9, 20, 600])
@pytest.mark.usefixtures("hopper")
def test_outer_scales_are_within_the_bound_of_the_oracle(
    way: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one product of cuBLASLt, as it is refused all others: with a bias of the result's own type, and with one scale."""
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", way)
    monkeypatch.setenv("SQ_EMULATED_REFUSES", "sums")
    n, k = 48, 64
    for turn, (a_dtype, b_dtype) in enumerate(OUTER_PAIRS * 4):
        a, b = random_float8(rows, k, dtype=a_dtype), random_float8(n, k, dtype=b_dtype, seed=1)
        dtype = FLOATS[turn % 3]
        bias = at_16_bytes(randn(n, dtype=dtype), 0) if dtype != torch.float32 and turn % 4 else None
        a_scale, b_scale = ((rows, n), (1, n), (rows, 1), (1, 1))[turn // 3]
        arguments = (a, b, at_16_bytes(scales(a_scale), turn % 2), at_16_bytes(scales(b_scale, seed=1), turn % 3), bias)
        y, oracle = ops.w8a8_gemm(*arguments, dtype), reference.w8a8_gemm(*arguments, dtype)
        _, bound = exact_fp8(dtype, *arguments)
        assert y.dtype == dtype
        assert bool(((y.double() - oracle.double()).abs() <= 2 * bound).all()), (turn, rows)  # each is within one


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


# --- our own tensor-core products -----------------------------------------------------------------------------------

OWN = [*(("mma", arch) for arch in ARCHS), ("wgmma", 90)]
TILES = [(0, 16, 16), (1, 33, 16), (9, 16, 32), (130, 17, 208), (20, 136, 1040), (300, 16, 16), (12, 0, 16)]
ON_HOPPER = [own for own in OWN if own[1] == 90]


def named(own: tuple[str, int]) -> str:
    return f"{own[0]} on {own[1]}"


@pytest.fixture(params=OWN, ids=named)
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


def test_own_fp8_products_are_within_the_bound(own: tuple[str, int]) -> None:
    family, arch = own
    for a_dtype, b_dtype in PAIRS:
        arguments = fp8_product(20, 33, 208, a_dtype, b_dtype)
        if arch < 89:
            sentence = f"SMOOTHQUANT_CUDA_GEMM is {family}, but compute capability 8.0 has no"
            with pytest.raises(RuntimeError, match=sentence):
                ops.w8a8_gemm(*arguments, torch.bfloat16)
        else:
            check_fp8(ops.w8a8_gemm(*arguments, torch.bfloat16), *arguments)


@pytest.mark.parametrize("own", ON_HOPPER, ids=named, indirect=True)
@pytest.mark.usefixtures("own")
def test_own_products_of_which_wgmma_splits_k() -> None:
    """It swaps operands too, see gemm_config_test.cpp; mma's kernels are those of every architecture."""
    m, n, k = 5, 40, 4096
    arguments = (random_int8(m, k), random_int8(n, k, seed=1), scales(m), scales(n), randn(n), torch.float32)
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))
    for a_dtype, b_dtype in (FLOAT8, FLOAT8[::-1]):
        fp8 = fp8_product(m, n, k, a_dtype, b_dtype)
        check_fp8(ops.w8a8_gemm(*fp8, torch.bfloat16), *fp8)


@pytest.mark.usefixtures("own")
def test_layers_on_our_own_products_equal_the_oracle() -> None:
    x = randn(20, 64, dtype=torch.bfloat16)
    x[2, 3], x[3], x[4, 5] = torch.nan, 0.0, torch.inf
    single = (x, *weight(32, 64), randn(32), None, randn(64, seed=4).abs() + 0.2, torch.float16)
    same(ops.w8a8_linear(*single), reference.w8a8_linear(*single))
    layers = lists(weight(48, 64), weight(48, 64, seed=2), weight(32, 48, seed=3))
    same(ops.w8a8_mlp(x, *layers), reference.w8a8_mlp(x, *layers))


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
        ("library", 90, "", 40, "is library, but K is 40, expected a positive multiple of 16"),
        ("library_fast", 90, "", 64, "is library_fast, but only fp8 tensor cores add with fewer bits"),
        ("cutlass", 90, "", 64, "is 'cutlass', expected auto, library, library_fast, skinny, mma, wgmma or torch"),
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


# --- ways to multiply -----------------------------------------------------------------------------------------------

UNMEASURED = "8=skinny,library,torch;=library,skinny,torch"
TORCH = torch.library.Library("sq", "IMPL")  # what smoothquant_ext implements on GPUs


@pytest.fixture(scope="session")
def torch_calls() -> list[tuple[int, ...]]:
    """The shapes of a with which the way ``torch`` was called, on the tensors of this emulation."""
    calls: list[tuple[int, ...]] = []

    def gemm_by_torch(*arguments: Any) -> Tensor:
        calls.append(tuple(arguments[0].shape))
        result: Tensor = reference.w8a8_gemm(*arguments)
        return result

    TORCH.impl("_gemm_by_torch", gemm_by_torch, "CPU")
    return calls


@pytest.fixture
def ranked(hopper: None, registered: Any, torch_calls: list[tuple[int, ...]]) -> Iterator[Callable[[str, str], None]]:
    """``_set_cuda_ways``, taken back in the end; ``torch_calls`` is empty at first."""
    torch_calls.clear()
    yield registered._set_cuda_ways
    for dtype in ("int8", "fp8"):
        registered._set_cuda_ways(dtype, UNMEASURED)


def int8_problem(m: int, n: int, k: int) -> tuple[Any, ...]:
    return (random_int8(m, k), random_int8(n, k, seed=1), scales(m), scales(n), randn(n), torch.bfloat16)


def test_what_is_tried_before_anything_was_measured(registered: Any) -> None:
    for dtype in ("int8", "fp8"):
        assert registered._cuda_way(dtype, 1) == registered._cuda_way(dtype, 8) == "skinny,library,torch"
        assert registered._cuda_way(dtype, 9) == registered._cuda_way(dtype, 1 << 40) == "library,skinny,torch"


def test_a_ranking_is_of_a_dtype_and_of_numbers_of_rows(ranked: Callable[[str, str], None], registered: Any) -> None:
    ranked("fp8", "1=skinny;64=wgmma,library_fast,torch;=library")
    asked = [registered._cuda_way("fp8", rows) for rows in (0, 1, 2, 64, 65)]
    assert asked == ["skinny", "skinny", *["wgmma,library_fast,torch"] * 2, "library"]
    assert registered._cuda_way("int8", 64) == "library,skinny,torch"


TABLES = [
    ("", "'' has no '=', expected rows=way,way"),
    ("=", "there is no way '' to multiply, expected library, library_fast, skinny, mma, wgmma or torch"),
    ("=library,", "there is no way '' to multiply"),
    ("=cutlass", "there is no way 'cutlass' to multiply"),
    ("=library,torch,library", "library is twice in 'library,torch,library'"),
    ("8=library", "the last class ends at '8' rows, expected one without an end"),
    ("=library;=torch", "'' is no positive number of rows"),
    ("0=library;=torch", "'0' is no positive number of rows"),
    ("-8=library;=torch", "'-8' is no positive number of rows"),
    ("1234567890123456789=library;=torch", "is no positive number of rows"),
    ("8=library;8=mma;=torch", "8 rows follow 8, expected ascending numbers"),
    ("8=library;4=mma;=torch", "4 rows follow 8, expected ascending numbers"),
    ("=library_fast", "library_fast is for fp8 only"),
]


@pytest.mark.parametrize(("table", "sentence"), TABLES)
def test_a_ranking_that_is_wrong_changes_nothing(
    table: str, sentence: str, ranked: Callable[[str, str], None], registered: Any
) -> None:
    ranked("int8", "=skinny")
    with pytest.raises(RuntimeError, match=f"_set_cuda_ways: .*{re.escape(sentence)}"):
        ranked("int8", table)
    assert registered._cuda_way("int8", 1) == "skinny"


def test_there_are_two_dtypes_to_rank(ranked: Callable[[str, str], None], registered: Any) -> None:
    for ask in (lambda: ranked("int4", "=torch"), lambda: registered._cuda_way("int4", 1)):
        with pytest.raises(RuntimeError, match="dtype is 'int4', expected int8 or fp8"):
            ask()


@pytest.mark.parametrize("way", ["library", "skinny", "mma", "wgmma", "torch"])
@pytest.mark.parametrize("m", [1, 20, 300])
def test_every_way_computes_what_the_oracle_does(
    way: str, m: int, ranked: Callable[[str, str], None], torch_calls: list[tuple[int, ...]]
) -> None:
    ranked("int8", f"={way}")
    arguments = int8_problem(m, 32, 64)
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), way)
    assert torch_calls == ([(m, 64)] if way == "torch" else [])


def test_ways_are_tried_in_their_order(
    ranked: Callable[[str, str], None], torch_calls: list[tuple[int, ...]]
) -> None:
    ranked("int8", "20=mma,torch;=library,wgmma,torch")
    for m, k, calls in ((20, 64, 0), (20, 40, 1), (21, 64, 0), (21, 40, 1)):
        torch_calls.clear()
        arguments = int8_problem(m, 16, k)
        same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), (m, k))
        assert len(torch_calls) == calls, (m, k)


def test_where_no_way_can_the_last_one_says_why(ranked: Callable[[str, str], None]) -> None:
    ranked("int8", "=library,mma")
    sentence = "w8a8_gemm: no way of library,mma can multiply this: K is 40, expected a positive multiple of 16"
    with pytest.raises(RuntimeError, match=sentence):
        ops.w8a8_gemm(*int8_problem(20, 33, 40))


@pytest.mark.parametrize(("value", "calls"), [("", 1), ("auto", 1), ("library", 0), ("torch", 1), ("skinny", 0)])
def test_the_environment_goes_before_the_ranking(
    value: str,
    calls: int,
    ranked: Callable[[str, str], None],
    torch_calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranked("int8", "=torch")
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", value)
    arguments = int8_problem(20, 16, 64)
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), value)
    assert len(torch_calls) == calls


@pytest.mark.parametrize("m", [520, 513, 257])
def test_a_chunk_that_is_refused_leaves_the_others_as_they_are(
    m: int,
    ranked: Callable[[str, str], None],
    torch_calls: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks have up to 256 rows here, and none has few."""
    last = {520: 168, 513: 161, 257: 129}[m]
    monkeypatch.setenv("SQ_EMULATED_REFUSES", f"M={last}")
    ranked("int8", "=library,torch")
    for a_scale in (m, 1):
        torch_calls.clear()
        arguments = (random_int8(m, 32), random_int8(16, 32, seed=1), scales(a_scale), scales(16), None, torch.float16)
        same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), a_scale)
        assert torch_calls == [(last, 32)]
    ranked("int8", "=library,wgmma")
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))


def test_layers_of_several_dimensions_go_by_torch_too(ranked: Callable[[str, str], None]) -> None:
    ranked("int8", "=torch")
    x = randn(2, 5, 64, dtype=torch.bfloat16)
    single = (x, *weight(32, 64), randn(32), None, None, torch.float16)
    same(ops.w8a8_linear(*single), reference.w8a8_linear(*single))


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_fast_accumulation_is_for_fp8_tensor_cores(
    arch: int, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", "library_fast")
    monkeypatch.setenv("SQ_EMULATED_ARCH", str(arch))
    arguments = fp8_product(20, 32, 64, *PAIRS[0])
    if arch == 80:
        with pytest.raises(RuntimeError, match="is library_fast, but only fp8 tensor cores add with fewer bits"):
            ops.w8a8_gemm(*arguments, torch.bfloat16)
        return
    check_fp8(ops.w8a8_gemm(*arguments, torch.bfloat16), *arguments)
    monkeypatch.setenv("SQ_EMULATED_REFUSES", "fast")  # it is what was asked for
    with pytest.raises(RuntimeError, match="but cuBLASLt has no algorithm for M=20, N=32 and K=64"):
        ops.w8a8_gemm(*arguments, torch.bfloat16)


@pytest.mark.usefixtures("hopper")
def test_a_thread_that_never_called_cuda_can_multiply() -> None:
    arguments = int8_problem(20, 32, 64)
    with ThreadPoolExecutor(1) as pool:  # cuBLASLt wants a context, see emulated_device.cpp
        y = pool.submit(ops.w8a8_gemm, *arguments).result()
    same(y, reference.w8a8_gemm(*arguments))


@pytest.mark.usefixtures("hopper")
def test_what_a_graph_cannot_capture_is_made_before(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = int8_problem(20, 32, 64)
    monkeypatch.setenv("SQ_EMULATED_DEVICE", "new")
    monkeypatch.setenv("SQ_EMULATED_CAPTURES", "1")
    with pytest.raises(RuntimeError, match="a handle is made while a graph is captured"):
        ops.w8a8_gemm(*arguments)
    monkeypatch.delenv("SQ_EMULATED_CAPTURES")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(registered._cuda_warm_up, 0).result()
    monkeypatch.setenv("SQ_EMULATED_CAPTURES", "1")
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))
    for device in (-1, 64):
        with pytest.raises(RuntimeError, match=f"_cuda_warm_up: there is no CUDA device {device}"):
            registered._cuda_warm_up(device)


# --- layers ---------------------------------------------------------------------------------------------------------


def weight(n: int, k: int, seed: int = 1, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    return reference.quantize_per_token(randn(n, k, seed=seed), dtype)


def lists(*layers: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """``weight`` and ``weight_scale`` of several layers."""
    return [w for w, _ in layers], [scale for _, scale in layers]


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layers_equal_the_oracle(arch: int, case: OpCase) -> None:
    """In FP8 too: it takes the emulated products as they are, see ``expected_of``."""
    for turn, shape in enumerate((((0,), 64, 32), ((9,), 70, 33), ((1,), 64, 32), ((20,), 64, 32))):
        for eight_bit in EIGHT_BIT[: 1 + turn // 2]:
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
        (lambda: ops.w8a8_mlp(X, [B, B], [S, S]), r"act\(first\) has K=9, but weight\[1\] \(down\) has K=40"),
    ],
)
@pytest.mark.usefixtures("hopper")
def test_errors_are_those_of_the_cpu(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
