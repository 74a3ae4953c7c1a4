"""Times the ways to multiply on a GPU, and ranks them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .families import DTYPES, ROW_CLASSES, WAYS, way_of, ways_table
from .records import Record, Timing

LAYERS = ((4096, 4096), (6144, 2048))
"""N and K of the timed products: linear layers of models of 8 and 1.7 billion parameters."""
MOST_ROWS = 4096
"""The rows that stand for any more than the last bounded class."""
COLD_BYTES = 128 << 20
"""Weights take turns so that this much lies between two uses of one: more than the L2 cache of any GPU."""
REPLAYS = 5


def rows_of(row_class: int) -> int:
    """The rows at which a class is timed."""
    return row_class or MOST_ROWS


def time_ways(families: Sequence[str], device: str) -> Iterator[Timing]:
    """Times these ways, such as "mma_int8", for every class of rows; what cannot compute a product is left out."""
    for dtype in DTYPES:
        ways = [way for family in families for way, of in [way_of(family) or ("", "")] if of == dtype]
        for n, k in LAYERS if ways else ():
            weights = [_random(n, k, dtype, device) for _ in range(max(2, COLD_BYTES // (n * k)))]
            for rows in map(rows_of, ROW_CLASSES):
                calls = _calls(_random(rows, k, dtype, device), weights)
                for way in ways:
                    os.environ["SMOOTHQUANT_CUDA_GEMM"] = way
                    try:
                        microseconds = time_us(calls)
                    except RuntimeError:  # it cannot compute this, or has no memory for it
                        continue
                    yield Timing(dtype, way, rows, n, k, round(microseconds, 3))


def _random(rows: int, columns: int, dtype: str, device: str) -> Tensor:
    codes = torch.randint(-100, 100, (rows, columns), dtype=torch.int8, device=device)
    return codes if dtype == "int8" else codes.float().div_(64).to(torch.float8_e4m3fn)


def _calls(a: Tensor, weights: Iterable[Tensor]) -> list[Callable[[], Tensor]]:
    a_scale = torch.ones(a.shape[0], device=a.device)

    def call(b: Tensor) -> Callable[[], Tensor]:
        b_scale = torch.ones(b.shape[0], device=b.device)
        return lambda: torch.ops.sq.w8a8_gemm(a, b, a_scale, b_scale, None, torch.bfloat16)

    return [call(b) for b in weights]


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one of the calls on the GPU, in a CUDA graph of all: the median of its replays."""
    for call in calls[:2]:  # what is made once is made now: handles, choices of algorithms
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / len(calls))
    graph.reset()
    return statistics.median(times)


# --- ranking --------------------------------------------------------------------------------------------------------

UNTIMED = {"few": ("skinny", "library", "mma", "wgmma"), "many": ("library", "mma", "wgmma", "skinny")}
"""The order of ways without a time. Fast accumulation is not among them: it has to be asked for, or measured."""
FEW_ROWS = 8


def ranking(records: Sequence[Record], dtype: str) -> str:
    """The ways to try for a dtype, by classes of rows, as ``torch.ops.sq._set_cuda_ways`` reads them.

    A way is there if it is right on every one of these GPUs that has it. Timed ones come first, by their mean ratio to
    the fastest on the first GPU, then the others in the order of ``UNTIMED``; torch's, which computes everything, is
    always there.
    """
    right = {way for way in WAYS if is_right(records, f"{way}_{dtype}")}
    timings = [timing for timing in records[0].timings if timing.dtype == dtype] if records else []
    order = {}
    for row_class in ROW_CLASSES:
        allowed = right | {"torch"}
        slowness = _slowness([each for each in timings if each.m == rows_of(row_class) and each.way in allowed])
        timed = sorted(slowness, key=slowness.__getitem__)
        defaults = (*UNTIMED["few" if 0 < row_class <= FEW_ROWS else "many"], "torch")
        order[row_class] = (*timed, *(way for way in defaults if way in allowed and way not in timed))
    return ways_table(order)


def is_right(records: Sequence[Record], family: str) -> bool:
    """Whether a family is right on every one of these GPUs that has it, and one has."""
    verdicts = [record.verdicts[family] for record in records if family in record.verdicts]
    return bool(verdicts) and all(verdict.is_right for verdict in verdicts)


def _slowness(timings: Sequence[Timing]) -> dict[str, float]:
    """By way, the geometric mean of its times over the fastest's; only of ways that computed every product."""
    shapes = {(timing.n, timing.k) for timing in timings}
    ratios: dict[str, list[float]] = {}
    for shape in shapes:
        own = [timing for timing in timings if (timing.n, timing.k) == shape]
        fastest = min(timing.microseconds for timing in own)
        for timing in own:
            ratios.setdefault(timing.way, []).append(timing.microseconds / fastest)
    complete = {way: each for way, each in ratios.items() if len(each) == len(shapes)}
    return {way: statistics.geometric_mean(each) for way, each in complete.items()}
