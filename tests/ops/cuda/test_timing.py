"""The ranking of ways to multiply, from verdicts and times."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated_cuda

from smoothquant_ext.ops.cuda.families import DTYPES, ROW_CLASSES, families_of
from smoothquant_ext.ops.cuda.records import HUNG, RIGHT, WRONG, Key, Record, Timing, Verdict
from smoothquant_ext.ops.cuda.timing import MOST_ROWS, ranking, rows_of

KEY = Key("GPU", 90, "", "", "", "")
ALL = Record(KEY, "", {family: Verdict(RIGHT) for family in families_of(90, "80 90a")}, ())


def ways(records: list[Record], dtype: str = "int8") -> dict[str, list[str]]:
    """By classes of rows."""
    return {rows: each.split(",") for rows, each in (part.split("=") for part in ranking(records, dtype).split(";"))}


def test_without_times_the_order_is_the_default() -> None:
    table = ways([ALL])
    assert list(table) == ["1", "8", "16", "64", "512", ""]
    assert table["8"] == ["skinny", "library", "mma", "wgmma", "torch"]
    assert table[""] == ["library", "mma", "wgmma", "skinny", "torch"]
    assert "library_fast" not in ways([ALL], "fp8")[""]


def test_what_is_not_right_is_not_used() -> None:
    verdicts = ALL.verdicts | {"library_int8": Verdict(WRONG), "wgmma_int8": Verdict(HUNG)}
    bad = ALL._replace(verdicts=verdicts)
    assert ways([bad])["64"] == ["mma", "skinny", "torch"]
    assert ways([bad], "fp8")["64"] == ["library", "mma", "wgmma", "skinny", "torch"]
    assert ways([])["1"] == ["torch"]


def test_every_gpu_has_to_agree_but_those_without_the_instructions() -> None:
    older = Record(KEY, "", {family: Verdict(RIGHT) for family in families_of(80, "80 90a")}, ())
    assert "wgmma" in ways([ALL, older])["64"]
    older = older._replace(verdicts=older.verdicts | {"mma_int8": Verdict(WRONG)})
    assert "mma" not in ways([ALL, older])["64"]


def times(**by_way: tuple[float, float]) -> list[Timing]:
    """Times of two products of 64 rows."""
    return [Timing("int8", way, 64, 8, 16 * i, us) for way, each in by_way.items() for i, us in enumerate(each, 1)]


def test_the_fastest_comes_first() -> None:
    timed = ALL._replace(timings=tuple(times(library=(2, 8), mma=(4, 2), torch=(9, 9))))
    # Over the fastest, mma takes 2 and 1, the library 1 and 4.
    assert ways([timed])["64"] == ["mma", "library", "torch", "wgmma", "skinny"]
    assert ways([timed])["512"] == ways([ALL])["512"]
    assert ways([timed], "fp8") == ways([ALL], "fp8")


def test_what_computes_only_some_products_is_not_ranked_by_them() -> None:
    some = [Timing("int8", "wgmma", 64, 8, 16, 0.1), *times(library=(2, 8))]
    assert ways([ALL._replace(timings=tuple(some))])["64"][:2] == ["library", "mma"]


def test_times_of_what_is_wrong_do_not_count() -> None:
    bad = ALL._replace(
        verdicts=ALL.verdicts | {"mma_int8": Verdict(WRONG)}, timings=tuple(times(mma=(1, 1), library=(2, 2)))
    )
    assert ways([bad])["64"][0] == "library"


def test_fast_sums_are_used_where_they_are_right_and_faster() -> None:
    timings = tuple(t._replace(dtype="fp8") for t in times(library=(2, 2), library_fast=(1, 1)))
    assert ways([ALL._replace(timings=timings)], "fp8")["64"][:2] == ["library_fast", "library"]


def test_every_class_is_timed_at_its_own_rows() -> None:
    assert [rows_of(each) for each in ROW_CLASSES] == [1, 8, 16, 64, 512, MOST_ROWS]


@pytest.mark.parametrize("records", [[], [ALL]], ids=["none", "all"])
def test_the_library_reads_the_ranking(records: list[Record]) -> None:
    with emulated_cuda():
        for dtype in DTYPES:
            torch.ops.sq._set_cuda_ways(dtype, ranking(records, dtype))
            assert torch.ops.sq._cuda_way(dtype, 64) == ",".join(ways(records, dtype)["64"])
