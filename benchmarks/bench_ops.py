"""Times the 8-bit linear layer over shapes, tokens and threads, beside every peer that is installed.

All methods take turns in one run; a number is the median of the turns. Up to 16 tokens the weights rotate through more
memory than the caches hold, as in a model. Results that are wrong are flagged, and their times not shown.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from machine import describe, peaks, write_results
from peers import BASELINE, PARTIAL, PEERS, Linear, Missing, ours, ours_fp8
from rich.console import Console
from rich.progress import track
from rich.table import Table

SHAPES = "4096x4096,11008x4096,4096x11008,2048x2048,8192x2048"
ROTATED_BYTES = 192 << 20
TURN_SECONDS = 0.02
OURS, OURS_FP8 = "ours int8", "ours fp8"

out, err = Console(width=150), Console(stderr=True)


def main(
    shapes: Annotated[str, typer.Option(help="NxK, separated by commas.")] = SHAPES,
    tokens: Annotated[str, typer.Option(help="M, separated by commas.")] = "1,4,16,64,256,1024",
    threads: Annotated[int, typer.Option(help="torch's threads.")] = 1,
    turns: Annotated[int, typer.Option(help="How often each method is timed.")] = 9,
    only: Annotated[str, typer.Option(help="Peers whose name contains this; 'none' for none.")] = "",
    fp8: Annotated[bool, typer.Option(help="Time ours in FP8 as well.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where the raw results go, as JSON.")] = None,
) -> None:
    """Effective GOPS (2 M N K over the time of a whole call) of ours and of peers."""
    torch.set_num_threads(threads)
    methods = {OURS: ours} | ({OURS_FP8: ours_fp8} if fp8 else {})
    methods |= {name: maker for name, (maker, _) in PEERS.items() if only in name or name == BASELINE}
    machine = describe(*{package for _, package in PEERS.values()})
    limits = peaks(threads)
    err.print(f"{machine['cpu']}, {threads} threads, {machine['cpu_isa']}; limits: {limits}", highlight=False)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    cases = [(tuple(map(int, shape.split("x"))), m) for shape in shapes.split(",") for m in map(int, tokens.split(","))]
    for (n, k), m in track(cases, "Timing", console=err):
        rows.append({"n": n, "k": k, "m": m, "methods": time_case(methods, n, k, m, turns, skipped)})
    for name, reason in skipped.items():
        err.print(f"{name} is left out: {reason}", highlight=False)
    out.print(table(rows, limits))
    if output is not None:
        write_results(output, {"machine": machine, "limits": limits, "skipped": skipped, "rows": rows})


def time_case(
    methods: dict[str, Any], n: int, k: int, m: int, turns: int, skipped: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Median seconds a call of every method for one shape, and its largest error relative to the output's size."""
    generator = torch.Generator().manual_seed(0)
    copies = max(1, -(-ROTATED_BYTES // (n * k))) if m <= 16 else 1
    weight = torch.randn(n, k, generator=generator).to(torch.bfloat16)
    x = torch.randn(m, k, generator=generator).to(torch.bfloat16)
    exact = x.float() @ weight.float().t()
    made: dict[str, list[Linear]] = {}
    errors: dict[str, float] = {}
    for name, maker in methods.items():
        if name in skipped:
            continue
        try:
            made[name] = [maker(weight.clone()) for _ in range(copies)]
            errors[name] = float((made[name][-1](x).float() - exact).norm() / exact.norm())
        except Missing as reason:
            skipped[name] = str(reason)
        except (RuntimeError, NotImplementedError, ImportError, AttributeError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if name in skipped:
            made.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    repeats = {name: max(1, round(TURN_SECONDS / _once(functions, x))) for name, functions in made.items()}
    names = list(made)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            functions = made[name]
            calls = max(repeats[name], copies)  # every copy: none stays in a cache
            start = time.perf_counter()
            for call in range(calls):
                functions[call % copies](x)
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: {"seconds": statistics.median(s), "error": errors[name]} for name, s in seconds.items()}


def _once(functions: list[Linear], x: torch.Tensor) -> float:
    functions[0](x)
    start = time.perf_counter()
    functions[-1](x)
    return time.perf_counter() - start


def is_correct(result: dict[str, Any]) -> bool:
    """Within what 8 bits a value cost on normally distributed data: 1 % for INT8, 4 % for e4m3."""
    return bool(result["error"] < 0.05)


def limit_seconds(row: dict[str, Any], limits: dict[str, float]) -> float:
    """The least that the multiply-adds and the bytes of the weight can take on this machine."""
    arithmetic = 2 * row["m"] * row["n"] * row["k"] / (limits.get("int8_gops", float("inf")) * 1e9)
    return max(arithmetic, row["n"] * row["k"] / (limits["dram_gbytes_per_s"] * 1e9) if row["m"] <= 16 else 0)


class Summary(NamedTuple):
    """How fast ours is: the part of the machine's limit, and how many times as fast as others."""

    of_limit: float
    over_baseline: float
    over_best: float


def summary(row: dict[str, Any], limits: dict[str, float]) -> Summary:
    """Of one shape; the best is the fastest correct peer that does all of the work."""
    seconds = {name: result["seconds"] for name, result in row["methods"].items() if is_correct(result)}
    best = min(seconds[name] for name in seconds if name in PEERS and name not in PARTIAL)
    return Summary(*(s / seconds[OURS] for s in (limit_seconds(row, limits), seconds[BASELINE], best)))


def table(rows: list[dict[str, Any]], limits: dict[str, float]) -> Table:
    """GOPS of every method; ours also as a part of the limit, and over the baseline and the best correct peer."""
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
        of_limit, over_baseline, over_best = summary(row, limits)
        result.add_row(
            f"{row['n']}x{row['k']}",
            str(row["m"]),
            *cells,
            f"{of_limit:.0%}",
            f"{over_baseline:.2f}",
            f"{over_best:.2f}",
        )
    return result


if __name__ == "__main__":
    typer.run(main)
