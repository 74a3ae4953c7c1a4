"""Times the 8-bit linear layer over shapes, tokens and threads, beside every peer that is installed.

Each engine runs in a separate process, and all methods take turns in one run. A number is the median of the turns. Up
to 16 tokens the weights rotate through more memory than the caches hold, as in a model. Methods with wrong results are
marked and get no time.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from machine import describe, mean_limits, peaks, write_results
from ops_timer import Case, OpsTimer
from peers import BASELINE, METHODS, OURS, OURS_FP8, OURS_ONE_THREAD, environment
from rich.console import Console
from rich.progress import track
from rich.table import Table
from workers import Worker, WorkerError, first_cpus

SHAPES = "4096x4096,11008x4096,4096x11008,2048x2048,8192x2048"
TOKENS = "1,4,16,64,256,1024"
OUR_METHODS = {OURS, OURS_ONE_THREAD, OURS_FP8}
ODD, ODD_TOKENS, EVEN, MULTIPLE = (1, 577, 1376, 2367, 7392), "1,16,256", 4096, 64

out, err = Console(width=180), Console(stderr=True)


def main(
    shapes: Annotated[str, typer.Option(help="NxK, separated by commas.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help=f"M, separated by commas. [default: {TOKENS}; --odd: {ODD_TOKENS}]")] = "",
    threads: Annotated[int, typer.Option(help="Threads, each on a separate CPU.", min=1)] = 1,
    turns: Annotated[int, typer.Option(help="Number of times each method is timed.", min=1)] = 9,
    only: Annotated[str, typer.Option(help="Peers with this in their name; 'none' for none.")] = "",
    fp8: Annotated[bool, typer.Option(help="Time smoothquant-ext in FP8 too.")] = False,
    odd: Annotated[bool, typer.Option("--odd", help="Time odd N and K and the next multiples of 64.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the raw results as JSON.")] = None,
) -> None:
    """Measures effective GOPS: 2 M N K divided by the time of a whole call."""
    machine = start(threads)
    before = peaks(threads)
    err.print(f"limits: {before}", highlight=False)
    skipped: dict[str, str] = {}
    with engines(threads) as workers:
        if odd:
            results = {"odd": time_odd(workers, _numbers(tokens or ODD_TOKENS), turns)}
        else:
            names = [OURS, *([OURS_ONE_THREAD] if threads > 1 else []), *([OURS_FP8] if fp8 else []), BASELINE]
            names += [name for name in METHODS if only in name and name not in OUR_METHODS | {BASELINE}]
            sizes = [_numbers(shape, "x") for shape in shapes.split(",")]
            cases = [Case(n, k, m) for n, k in sizes for m in _numbers(tokens or TOKENS)]
            results = {"rows": time_all(workers, names, cases, turns, skipped)}
    after = peaks(threads)
    limits = mean_limits(before, after)
    for name, reason in skipped.items():
        err.print(f"{name} is left out: {reason}", highlight=False)
    out.print(odd_table(results["odd"]) if odd else table(results["rows"], limits))
    if output is not None:
        measured = {"limits": limits, "limits_before": before, "limits_after": after, "skipped": skipped}
        write_results(output, {"machine": machine, **measured, **results})


def start(threads: int) -> dict[str, Any]:
    """Pins this process and its children to the first CPUs; prints and returns the machine's description."""
    os.sched_setaffinity(0, first_cpus(threads))
    torch.set_num_threads(threads)
    machine = describe(*{method.package for method in METHODS.values()})
    err.print(f"{machine['cpu']}, {threads} threads, {machine['cpu_isa']}", highlight=False)
    if machine["load"] > 0.3:
        err.print(f"[yellow]The machine is busy (load {machine['load']}): wait, or the numbers will be wrong.")
    return machine


def _numbers(text: str, separator: str = ",") -> list[int]:
    return [int(number) for number in text.split(separator)]


class Engines(dict[str, Worker]):
    """Workers by engine, started at their first use."""

    def __init__(self, threads: int, stack: ExitStack) -> None:
        super().__init__()
        self._threads, self._stack = threads, stack

    def __missing__(self, engine: str) -> Worker:
        variables = environment(engine, first_cpus(self._threads))
        worker = Worker(OpsTimer, threads=self._threads, environment=variables)
        self[engine] = self._stack.enter_context(worker)
        return worker


@contextmanager
def engines(threads: int) -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(threads, stack)


def time_all(
    workers: Engines, names: list[str], cases: list[Case], turns: int, skipped: dict[str, str]
) -> list[dict[str, Any]]:
    """Times every method on every shape; a method that cannot run is skipped from then on."""
    rows = []
    for case in track(cases, "Timing", console=err):
        errors = {}
        for name in names:
            if name in skipped:
                continue
            try:
                errors[name] = workers[METHODS[name].engine].call("prepare", name, case)
            except WorkerError as reason:
                skipped[name] = str(reason)
        seconds = take_turns(workers, [(name, case) for name in errors], turns)
        methods = {name: {"seconds": seconds[name, case], "error": errors[name]} for name in errors}
        rows.append({"n": case.n, "k": case.k, "m": case.m, "methods": methods})
    return rows


def take_turns(workers: Engines, entries: Sequence[tuple[str, Case]], turns: int) -> dict[tuple[str, Case], float]:
    """Median seconds a call of each entry, in an order that rotates from turn to turn."""
    seconds: dict[tuple[str, Case], list[float]] = {entry: [] for entry in entries}
    for turn in range(turns):
        first = turn % len(entries)
        for name, case in [*entries[first:], *entries[:first]]:
            seconds[name, case].append(workers[METHODS[name].engine].call("turn", name, case))
    for worker in workers.values():
        worker.call("clear")
    return {entry: statistics.median(values) for entry, values in seconds.items()}


def time_odd(workers: Engines, tokens: list[int], turns: int) -> list[dict[str, Any]]:
    """Times odd N and odd K, each in turn with the next multiple of 64."""
    rows = []
    pairs = [(size, -(-size // MULTIPLE) * MULTIPLE) for size in ODD]
    cases = [(Case(size, EVEN, m), Case(padded, EVEN, m)) for size, padded in pairs for m in tokens]
    cases += [(Case(EVEN, size, m), Case(EVEN, padded, m)) for size, padded in pairs for m in tokens]
    for pair in track(cases, "Timing", console=err):
        for case in pair:
            workers[METHODS[OURS].engine].call("prepare", OURS, case)
        own, multiple = take_turns(workers, [(OURS, case) for case in pair], turns).values()
        case = pair[0]
        rows.append({"n": case.n, "k": case.k, "m": case.m, "seconds": own, "multiple_seconds": multiple})
    return rows


def is_correct(result: dict[str, Any]) -> bool:
    """Whether the error is at most that of 8 bits on normally distributed data: 1 % for INT8, 4 % for e4m3."""
    return bool(result["error"] < 0.05)


def limit_seconds(row: dict[str, Any], limits: dict[str, float]) -> float:
    """The shortest possible time for the multiply-adds and for reading the weight on this machine."""
    arithmetic = 2 * row["m"] * row["n"] * row["k"] / (limits.get("int8_gops", float("inf")) * 1e9)
    return max(arithmetic, row["n"] * row["k"] / (limits["dram_gbytes_per_s"] * 1e9) if row["m"] <= 16 else 0)


class Summary(NamedTuple):
    """Speed of smoothquant-ext: the part of the machine's limit, and the speed-up over others."""

    of_limit: float
    over_baseline: float
    over_best: float


def summary(row: dict[str, Any], limits: dict[str, float]) -> Summary:
    """The summary of one shape; the best peer is the fastest correct one that does all of the work."""
    seconds = {name: result["seconds"] for name, result in row["methods"].items() if is_correct(result)}
    peers = seconds.keys() - OUR_METHODS - {name for name, method in METHODS.items() if method.partial}
    best = min(seconds[name] for name in peers)
    return Summary(*(s / seconds[OURS] for s in (limit_seconds(row, limits), seconds[BASELINE], best)))


def table(rows: list[dict[str, Any]], limits: dict[str, float]) -> Table:
    """Prints GOPS of every method; ours also as a part of the limit, and divided by the baseline and the best peer."""
    names = list(dict.fromkeys(name for row in rows for name in row["methods"]))
    result = Table(title="effective GOPS; a wrong result is shown as such")
    for heading in ("N x K", "M", *names, "of limit", "over bf16", "over best peer"):
        result.add_column(heading, justify="right")
    for row in rows:
        methods = row["methods"]
        gops = {name: 2 * row["m"] * row["n"] * row["k"] / r["seconds"] / 1e9 for name, r in methods.items()}
        cells = [
            "–" if name not in methods else f"{gops[name]:.0f}" if is_correct(methods[name]) else "wrong"
            for name in names
        ]
        of_limit, *times = summary(row, limits)
        cells += [f"{of_limit:.0%}", *(f"{ratio:.2f}" for ratio in times)]
        result.add_row(f"{row['n']}x{row['k']}", str(row["m"]), *cells)
    return result


def odd_table(rows: list[dict[str, Any]]) -> Table:
    """Prints the time of each odd size divided by that of the next multiple."""
    result = Table(title=f"ours int8: time of an odd N or K over that of the next multiple of {MULTIPLE}")
    for heading in ("N x K", "M", "µs", "µs, multiple", "ratio"):
        result.add_column(heading, justify="right")
    for row in rows:
        own, multiple = row["seconds"], row["multiple_seconds"]
        cells = f"{own * 1e6:.1f}", f"{multiple * 1e6:.1f}", f"{own / multiple:.2f}"
        result.add_row(f"{row['n']}x{row['k']}", str(row["m"]), *cells)
    return result


if __name__ == "__main__":
    typer.run(main)
