"""Writes docs/performance.md and its figures from benchmarks/results/, which holds a folder for each machine.

Run it after bench_ops.py or bench_model.py with --output benchmarks/results/MACHINE/NAME.json. The page
copies NAME.md of such a folder, unchanged, after its tables.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from bench_model import OURS as OUR_MODEL
from bench_ops import OUR_METHODS, Summary, is_correct, summary
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import BASELINE, METHODS, OURS, OURS_ONE_THREAD

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "figures"
LIMITS = {"int8_gops": "GOPS in INT8", "bf16_gflops": "GFLOPS in bf16", "dram_gbytes_per_s": "GB/s from memory"}

KINDS = ("linear", "odd", "model")  # of results; other kinds are on other pages
INTRODUCTION = """# Performance

`make bench` measures; `tools/write_performance.py` writes this page from the raw results in `benchmarks/results/`.
There is one section for each machine.

- Each engine ran in a separate process, which was stopped while others were timed: idle thread pools take cores from
  others.
- All methods of a table took turns in one run. Numbers are medians. Compare only ratios within a run.
- The time of a linear layer is the time of the whole call and includes the quantization of the activation. GOPS are
  2 M N K divided by that time. A peer that takes fp32 gets fp32: the conversion is not counted.
- *Of the limit* is the time at the machine's limit divided by our time. The limit is the measured peak of multiply-adds
  or, up to 16 tokens, the measured memory speed for reading the weight. Up to 16 tokens the weights rotate through more
  memory than the caches hold. Limits are the mean of two measurements, before and after the run.
- *Best peer* is the fastest peer for each shape whose result is right and that does all of the work. Columns marked *
  leave out the quantization and do not count.
- A model's *prompt* is the time to the first token of every answer. Its *answer* is the time of all tokens after those.
"""


def main() -> None:
    """Writes the page and its figures."""
    TARGET.write_text(page(), encoding="utf-8")
    for folder in machines():
        for path, results in results_of(folder).items():
            if "rows" in results and "limits" in results:
                name = f"{folder.name}-{path.stem}"
                plot_speedups(results["rows"], FIGURES / f"{name}.svg")
                plot_roofline(results["rows"], results["limits"], FIGURES / f"{name}-roofline.svg")


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for folder in machines():
        results = results_of(folder)
        if not results:
            continue
        parts.append(machine_heading(next(iter(results.values()))["machine"]))
        parts += [section(f"{folder.name}-{path.stem}", each) for path, each in results.items()]
        parts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))]
    return "\n".join(parts)


def machines() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def results_of(folder: Path) -> dict[Path, dict[str, Any]]:
    """The results of one machine by their files."""
    paths = sorted(path for kind in KINDS for path in folder.glob(f"{kind}-*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def machine_heading(machine: dict[str, Any]) -> str:
    return f"## {machine['cpu']}, {machine['cpu_isa'].upper()}\n"


def section(name: str, results: dict[str, Any]) -> str:
    """The section of one file of results."""
    if "odd" in results:
        return odd_section(results)
    return ops_section(name, results) if "limits" in results else model_section(results)


def threads_of(results: dict[str, Any]) -> str:
    threads = results["machine"]["threads"]
    return f"{threads} thread{'s' * (threads > 1)}"


def about(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, kernels for {machine['cpu_isa']}; "
        f"{versions}; commit {machine['commit']}, {machine['date']}.\n"
    )


def left_out(results: dict[str, Any]) -> str:
    return "".join(f"- not measured: {name}, {reason}\n" for name, reason in results["skipped"].items())


def ops_section(name: str, results: dict[str, Any]) -> str:
    """The linear layer on one machine and number of threads."""
    limits, rows = results["limits"], results["rows"]
    before, after = results["limits_before"], results["limits_after"]
    measured = [f"{before[key]:.0f} and {after[key]:.0f} {unit}" for key, unit in LIMITS.items() if key in limits]
    return "\n".join(
        [
            f"### Linear layer, {threads_of(results)}\n",
            about(results["machine"]),
            f"Limits, before and after: {', '.join(measured)}.\n",
            summary_table(rows, limits),
            f"![speed-up over torch bf16](figures/{name}.svg)\n",
            f"![roofline](figures/{name}-roofline.svg)\n",
            gops_table(rows),
            left_out(results),
        ]
    )


def summary_table(rows: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """Geometric mean over the shapes, and the worst shape."""
    shapes = ", ".join(dict.fromkeys(f"{row['n']}x{row['k']}" for row in rows))
    lines = [
        f"smoothquant-ext in INT8: geometric mean over N x K = {shapes}; the worst shape in parentheses.\n",
        "| M | of the limit | over torch bf16 | over the best peer |",
        "|---:|---:|---:|---:|",
    ]
    has_one_thread = all(OURS_ONE_THREAD in row["methods"] for row in rows)
    if has_one_thread:
        lines[1:] = [f"{lines[1]} over ours with 1 thread |", f"{lines[2]}---:|"]
    tokens = tokens_of(rows)
    for heading, among in [*((str(m), [m]) for m in tokens), ("all", tokens)]:
        columns = zip(*(summary(row, limits) for row in rows if row["m"] in among), strict=True)
        of_limit, *times = ((statistics.geometric_mean(column), min(column)) for column in columns)
        cells = [f"{of_limit[0]:.0%} ({of_limit[1]:.0%})", *(f"{mean:.2f} ({worst:.2f})" for mean, worst in times)]
        assert len(cells) == len(Summary._fields)
        if has_one_thread:
            timings = (row["methods"] for row in rows if row["m"] in among)
            gains = [methods[OURS_ONE_THREAD]["seconds"] / methods[OURS]["seconds"] for methods in timings]
            cells.append(f"{statistics.geometric_mean(gains):.2f} ({min(gains):.2f})")
        lines.append(f"| {heading} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def names_of(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["methods"]))


def tokens_of(rows: list[dict[str, Any]]) -> list[int]:
    return sorted({row["m"] for row in rows})


def gops_of(row: dict[str, Any], name: str) -> float | None:
    """Effective GOPS; ``None`` where the method did not run, 0 where its result is wrong."""
    result = row["methods"].get(name)
    if result is None:
        return None
    return 2 * row["m"] * row["n"] * row["k"] / result["seconds"] / 1e9 if is_correct(result) else 0.0


def gops_table(rows: list[dict[str, Any]]) -> str:
    """Effective GOPS of every method."""
    names = names_of(rows)
    headings = [f"{name} *" if METHODS[name].partial else name for name in names]
    lines = [
        "Effective GOPS:\n",
        f"| N x K | M | {' | '.join(headings)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for row in rows:
        gops = [gops_of(row, name) for name in names]
        cells = ["–" if value is None else f"{value:.0f}" if value else "wrong" for value in gops]
        lines.append(f"| {row['n']}x{row['k']} | {row['m']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_speedups(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times as fast as torch in bf16, over M: geometric mean over the shapes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in names_of(rows):
        means = []
        for m in tokens_of(rows):
            pairs = [(gops_of(row, name), gops_of(row, BASELINE)) for row in rows if row["m"] == m]
            means.append(_mean([gops / base for gops, base in pairs if gops and base]))
        _plot(axes, rows, name, means)
    axes.set(xscale="log", ylabel="speed-up over torch bf16")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, rows, path)


def plot_roofline(rows: list[dict[str, Any]], limits: dict[str, float], path: Path) -> None:
    """Effective GOPS over M, under the machine's limits in INT8 and bf16 with every weight read from memory."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tokens = tokens_of(rows)
    fine = [tokens[0] * (tokens[-1] / tokens[0]) ** (step / 200) for step in range(201)]
    for key, unit, weight_bytes, style in (("int8_gops", "INT8", 1, "--"), ("bf16_gflops", "bf16", 2, ":")):
        peak = limits.get(key, float("inf"))
        roof = [min(peak, 2 * m / weight_bytes * limits["dram_gbytes_per_s"]) for m in fine]
        axes.plot(fine, roof, color="black", linestyle=style, label=f"limit, {unit}")
    for name in names_of(rows):
        by_tokens = [[gops_of(row, name) for row in rows if row["m"] == m] for m in tokens]
        _plot(axes, rows, name, [_mean([value for value in values if value]) for values in by_tokens])
    axes.set(xscale="log", yscale="log", ylabel="effective GOPS")
    _finish(figure, axes, rows, path)


def _mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def _plot(axes: Axes, rows: list[dict[str, Any]], name: str, values: list[float]) -> None:
    is_ours = name in OUR_METHODS
    color = colormaps["tab20"](list(METHODS).index(name))  # the same in every figure
    style = {"marker": "o" if is_ours else ".", "linewidth": 2.5 if is_ours else 1, "color": color}
    axes.plot(tokens_of(rows), values, label=name, **style)


def _finish(figure: Figure, axes: Axes, rows: list[dict[str, Any]], path: Path) -> None:
    axes.set_xlabel("tokens (M)")
    axes.set_xticks(tokens_of(rows), [str(m) for m in tokens_of(rows)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def odd_section(results: dict[str, Any]) -> str:
    """The cost of an odd N or K."""
    ratios = [row["seconds"] / row["multiple_seconds"] for row in results["odd"]]
    summary_line = f"geometric mean {_mean(ratios):.2f}, worst {max(ratios):.2f}"
    lines = [
        f"### Odd sizes, {threads_of(results)}\n",
        about(results["machine"]),
        f"smoothquant-ext in INT8, time divided by that of the next multiple of 64: {summary_line}.\n",
        "| N x K | M | µs | µs, next multiple | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, ratio in zip(results["odd"], ratios, strict=True):
        odd, multiple = row["seconds"] * 1e6, row["multiple_seconds"] * 1e6
        lines.append(f"| {row['n']}x{row['k']} | {row['m']} | {odd:.1f} | {multiple:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def model_section(results: dict[str, Any]) -> str:
    """A whole model: tokens a second of every method, and ours divided by each."""
    lines = [
        f"### {results['model']}, {threads_of(results)}\n",
        about(results["machine"]),
        "| batch | | prompt tokens/s | ours over it | answer tokens/s | ours over it |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        rates = {name: tokens_per_second(speed) for name, speed in row["methods"].items()}
        ours = rates[OUR_MODEL]
        for name, (prompt, answer) in rates.items():
            cells = f"{prompt:.0f}", f"{ours[0] / prompt:.2f}", f"{answer:.1f}", f"{ours[1] / answer:.2f}"
            lines.append(f"| {row['batch']} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", left_out(results)])


def tokens_per_second(speed: dict[str, Any]) -> tuple[float, float]:
    """Medians: of all prompts together, of all answers together."""
    prompt = speed["batch"] * speed["prompt"] / statistics.median(speed["prefill_seconds"])
    return prompt, speed["batch"] * speed["generated"] / statistics.median(speed["decode_seconds"])


if __name__ == "__main__":
    main()
