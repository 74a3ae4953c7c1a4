"""The ways in which the CUDA ops multiply, and their ranking, without a GPU: see test_cuda_emulated.py."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from emulated_ops import ARCHS, check_fp8, fp8_product, int8_product, lists, ops_there, same, weight
from emulation import ROOT
from op_testing import FLOAT8, FLOATS, randn, random_float8, random_int8, scales
from torch import Tensor

from smoothquant_ext import ops, reference
from smoothquant_ext.reference.bounds import gemm_bound

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")

PAIRS = list(itertools.product(FLOAT8, FLOAT8))
ONE = torch.ones(1)


@pytest.fixture(scope="module", autouse=True)
def _device() -> Iterator[None]:
    with ops_there():
        yield


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One architecture, for what does not depend on it."""
    monkeypatch.setenv("SQ_EMULATED_ARCH", "90")


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


# --- cuBLASLt's -------------------------------------------------------------------------------------------------------


def at_16_bytes(tensor: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements behind a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    first = -room.data_ptr() % 16 // room.element_size() + offset
    return room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


OUTER_PAIRS = [pair for pair in PAIRS if pair != (torch.float8_e5m2, torch.float8_e5m2)]


@pytest.mark.parametrize("way", ["library", "library_fast"])
@pytest.mark.parametrize("rows", [1, 9, 20, 600])
@pytest.mark.usefixtures("hopper")
def test_outer_scales_are_within_the_bound_of_the_oracle(way: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one product of cuBLASLt, with a bias of the result's own type or one scale for all; it has no other."""
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
        _, bound = gemm_bound(*arguments, dtype)
        assert y.dtype == dtype
        assert bool(((y.double() - oracle.double()).abs() <= 2 * bound).all()), (turn, rows)  # each is within one


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_fast_accumulation_is_for_fp8_tensor_cores(arch: int, hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
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
    arguments = int8_product(20, 32, 64)
    with ThreadPoolExecutor(1) as pool:  # cuBLASLt wants a context, see emulated_device.cpp
        y = pool.submit(ops.w8a8_gemm, *arguments).result()
    same(y, reference.w8a8_gemm(*arguments))


@pytest.mark.usefixtures("hopper")
def test_what_a_graph_cannot_capture_is_made_before(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = int8_product(20, 32, 64)
    monkeypatch.setenv("SQ_EMULATED_DEVICE", "new")
    monkeypatch.setenv("SQ_EMULATED_CAPTURES", "1")
    with pytest.raises(RuntimeError, match="a handle is made while a graph is captured"):
        ops.w8a8_gemm(*arguments)
    monkeypatch.delenv("SQ_EMULATED_CAPTURES")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.ops.sq._cuda_warm_up, 0).result()
    monkeypatch.setenv("SQ_EMULATED_CAPTURES", "1")
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments))
    for device in (-1, 64):
        with pytest.raises(RuntimeError, match=f"_cuda_warm_up: there is no CUDA device {device}"):
            torch.ops.sq._cuda_warm_up(device)


# --- ways to multiply -----------------------------------------------------------------------------------------------

UNMEASURED = "8=skinny,library,torch;=library,skinny,torch"


@pytest.fixture
def torch_calls() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of a with which the way ``torch`` is called."""
    calls: list[tuple[int, ...]] = []

    def gemm_by_torch(*arguments: Any) -> Tensor:
        calls.append(tuple(arguments[0].shape))
        on_cpu = [torch.ops.emulated_cuda.back(x) if isinstance(x, Tensor) else x for x in arguments]
        result: Tensor = torch.ops.emulated_cuda.there(reference.w8a8_gemm(*on_cpu))
        return result

    library = torch.library.Library("sq", "IMPL")
    library.impl("_gemm_by_torch", gemm_by_torch, "CUDA", allow_override=True)
    yield calls
    library._destroy()


@pytest.fixture
def ranked(hopper: None, torch_calls: list[tuple[int, ...]]) -> Iterator[Callable[[str, str], None]]:
    """``_set_cuda_ways``, taken back in the end."""
    yield torch.ops.sq._set_cuda_ways
    for dtype in ("int8", "fp8"):
        torch.ops.sq._set_cuda_ways(dtype, UNMEASURED)


def test_what_is_tried_before_anything_was_measured() -> None:
    for dtype in ("int8", "fp8"):
        assert torch.ops.sq._cuda_way(dtype, 1) == torch.ops.sq._cuda_way(dtype, 8) == "skinny,library,torch"
        assert torch.ops.sq._cuda_way(dtype, 9) == torch.ops.sq._cuda_way(dtype, 1 << 40) == "library,skinny,torch"


def test_a_ranking_is_of_a_dtype_and_of_numbers_of_rows(ranked: Callable[[str, str], None]) -> None:
    ranked("fp8", "1=skinny;64=wgmma,library_fast,torch;=library")
    asked = [torch.ops.sq._cuda_way("fp8", rows) for rows in (0, 1, 2, 64, 65)]
    assert asked == ["skinny", "skinny", *["wgmma,library_fast,torch"] * 2, "library"]
    assert torch.ops.sq._cuda_way("int8", 64) == "library,skinny,torch"


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
def test_a_ranking_that_is_wrong_changes_nothing(table: str, sentence: str, ranked: Callable[[str, str], None]) -> None:
    ranked("int8", "=skinny")
    with pytest.raises(RuntimeError, match=f"_set_cuda_ways: .*{re.escape(sentence)}"):
        ranked("int8", table)
    assert torch.ops.sq._cuda_way("int8", 1) == "skinny"


def test_there_are_two_dtypes_to_rank(ranked: Callable[[str, str], None]) -> None:
    for ask in (lambda: ranked("int4", "=torch"), lambda: torch.ops.sq._cuda_way("int4", 1)):
        with pytest.raises(RuntimeError, match="dtype is 'int4', expected int8 or fp8"):
            ask()


@pytest.mark.parametrize("way", ["library", "skinny", "mma", "wgmma", "torch"])
@pytest.mark.parametrize("m", [1, 20, 300])
def test_every_way_computes_what_the_oracle_does(
    way: str, m: int, ranked: Callable[[str, str], None], torch_calls: list[tuple[int, ...]]
) -> None:
    ranked("int8", f"={way}")
    arguments = int8_product(m, 32, 64)
    same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), way)
    assert torch_calls == ([(m, 64)] if way == "torch" else [])


def test_ways_are_tried_in_their_order(ranked: Callable[[str, str], None], torch_calls: list[tuple[int, ...]]) -> None:
    ranked("int8", "20=mma,torch;=library,wgmma,torch")
    for m, k, calls in ((20, 64, 0), (20, 40, 1), (21, 64, 0), (21, 40, 1)):
        torch_calls.clear()
        arguments = int8_product(m, 16, k)
        same(ops.w8a8_gemm(*arguments), reference.w8a8_gemm(*arguments), (m, k))
        assert len(torch_calls) == calls, (m, k)


def test_where_no_way_can_the_last_one_says_why(ranked: Callable[[str, str], None]) -> None:
    ranked("int8", "=library,mma")
    sentence = "w8a8_gemm: no way of library,mma can multiply this: K is 40, expected a positive multiple of 16"
    with pytest.raises(RuntimeError, match=sentence):
        ops.w8a8_gemm(*int8_product(20, 33, 40))


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
    arguments = int8_product(20, 16, 64)
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
