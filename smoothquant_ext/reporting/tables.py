"""Tables for people: models side by side, and the report of a run of ``quantize``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation.agreement import Agreement
from ..evaluation.size import ModelBytes
from ..evaluation.speed import Speed, Throughput
from ..layer_names import by_reason, collapse
from ..ops import OpInfo
from ..ops.cuda.records import Record
from ..quantization.report import HeadReport, Report, SmoothedGroup


@dataclass(frozen=True)
class Measured:
    """The measurements of one model; the others of several are compared with the first."""

    name: str
    evaluation: Any  # an Evaluation of a causal language model, an Agreement of another
    size: ModelBytes
    speed: Speed | Throughput | None = None


@dataclass(frozen=True)
class Column:
    """A column of a comparison: its heading, its cell given a model and the first one, the cell's standard error."""

    heading: str
    cell: Callable[[Measured, Measured], str]
    error: Callable[[Any], str] = lambda _: ""


_SIZES = (
    Column("size MB", lambda model, _: f"{model.size.total / 1e6:.1f}"),
    Column("decoder", lambda model, first: _ratio(model.size.decoder, first.size.decoder)),
)
COLUMNS = (
    Column("perplexity", lambda model, _: f"{model.evaluation.perplexity:.3f}"),
    Column(
        "change %",
        lambda model, _: _number(model.evaluation.change, "+.2f", 100),
        lambda evaluation: _error(evaluation.change_error, ".2f", 100),
    ),
    Column(
        "KL",
        lambda model, _: _number(model.evaluation.kl, ".4f"),
        lambda evaluation: _error(evaluation.kl_error, ".4f"),
    ),
    Column(
        "top-1 %",
        lambda model, _: _number(model.evaluation.top1, ".1f", 100),
        lambda evaluation: _error(evaluation.top1_error, ".1f", 100),
    ),
    *_SIZES,
    Column("prefill tok/s", lambda model, _: f"{model.speed.prefill:.0f}" if isinstance(model.speed, Speed) else "–"),
    Column("decode tok/s", lambda model, _: f"{model.speed.decode:.1f}" if isinstance(model.speed, Speed) else "–"),
)
# Of models that do not continue texts; a column without a number for any of them is left out.
AGREEMENT_COLUMNS = (
    Column("error %", lambda model, _: _number(model.evaluation.error, ".2f", 100)),
    Column("cosine", lambda model, _: _number(model.evaluation.cosine, ".5f")),
    Column("lowest cosine", lambda model, _: _number(model.evaluation.worst_cosine, ".5f")),
    Column("KL", lambda model, _: _number(model.evaluation.kl, ".5f")),
    Column("top-1 %", lambda model, _: _number(model.evaluation.top1, ".1f", 100)),
    *(replace(column, heading=column.heading.replace("decoder", "blocks")) for column in _SIZES),
    Column("inputs /s", lambda model, _: _rate(model.speed)),
)
WIDE = 110  # columns of a terminal that has room for standard errors


def comparison_table(models: Sequence[Measured], title: str = "", errors: bool = False) -> Table:
    """Models side by side, a row each; sizes of the decoder blocks are relative to the first model's."""
    padding = (0, 1) if errors else (0, 0)  # all of it fits 80 characters
    table = Table(title=title or None, box=box.SIMPLE, padding=padding, show_edge=False, title_justify="left")
    table.add_column("model", overflow="fold")
    for column in columns_of(models):
        table.add_column(column.heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for cells in comparison_cells(models, errors):
        table.add_row(*cells)
    return table


def comparison_markdown(models: Sequence[Measured]) -> str:
    """The same as a markdown table, with standard errors."""
    columns = columns_of(models)
    lines = [["model", *(column.heading for column in columns)], ["---", *("---:" for _ in columns)]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines + comparison_cells(models, errors=True))


def comparison_cells(models: Sequence[Measured], errors: bool) -> list[list[str]]:
    """A row of cells for each model: its name and those of ``columns_of``, with standard errors if asked for."""
    columns = columns_of(models)
    return [
        [model.name]
        + [
            column.cell(model, models[0])
            + (column.error(model.evaluation) if errors and model is not models[0] else "")
            for column in columns
        ]
        for model in models
    ]


def columns_of(models: Sequence[Measured]) -> Sequence[Column]:
    """The columns of a comparison of these models."""
    if not any(isinstance(model.evaluation, Agreement) for model in models):
        return COLUMNS
    return [column for column in AGREEMENT_COLUMNS if any(column.cell(model, models[0]) != "–" for model in models)]


def measured_dict(model: Measured) -> dict[str, Any]:
    """The same as plain numbers, for JSON."""
    speed = model.speed
    sizes = {"decoder_bytes": model.size.decoder, "total_bytes": model.size.total}
    if isinstance(model.evaluation, Agreement):
        rate = speed.rows_per_second if isinstance(speed, Throughput) else None
        return {"name": model.name, **asdict(model.evaluation), **sizes, "inputs_per_second": rate}
    speed = speed if isinstance(speed, Speed) else None
    return {
        "name": model.name,
        **asdict(model.evaluation),
        **sizes,
        "prefill_tokens_per_second": speed.prefill if speed else None,
        "decode_tokens_per_second": speed.decode if speed else None,
        "speed": asdict(speed) if speed else None,
    }


def legend(models: Sequence[Measured] = ()) -> Text:
    """The meaning of a comparison's columns."""
    if any(isinstance(model.evaluation, Agreement) for model in models):
        return Text(
            "error: of the outputs, relative to the first model's. cosine: of the embeddings of an input. KL: how far "
            "the predictions drift from the first model's, nats each. top-1: how often both find the same class "
            "likeliest. blocks: their bytes, relative to the first model.",
            style="dim",
        )
    return Text(
        "change: of perplexity, against the first model on the same windows. KL: how far the predictions drift from "
        "the first model's, nats a token. top-1: how often both find the same token likeliest. ±: standard error over "
        "windows. decoder: bytes of the decoder blocks, relative to the first model.",
        style="dim",
    )


def info_table(rows: Sequence[OpInfo]) -> Table:
    """The result of ``ops.info``."""
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("op", "device", "backend", "why not a better one"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.op, row.device, row.backend, row.reason)
    return table


def proof_table(record: Record) -> Table:
    """What the proof of a GPU has shown, by family of kernels."""
    table = Table(box=box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0))
    for heading in (f"CUDA kernels on {record.key.gpu}", f"proven {record.date}", "seen"):
        table.add_column(heading)
    for family, verdict in record.verdicts.items():
        table.add_row(family, verdict.kind, Text(verdict.detail))
    return table


def timing_table(record: Record) -> Table:
    """The times of a GPU's proven ways to multiply, in microseconds: a row a product, a column a way."""
    ways = list(dict.fromkeys(timing.way for timing in record.timings))
    table = Table(title="Microseconds of a product", box=box.SIMPLE, show_edge=False, title_justify="left")
    for heading in ("dtype", "M", "N", "K", *ways):
        table.add_column(heading, justify="right")
    products: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for timing in record.timings:
        product = (timing.dtype, timing.m, timing.n, timing.k)
        products.setdefault(product, {})[timing.way] = timing.microseconds
    for product, times in products.items():
        table.add_row(*map(str, product), *(_number(times.get(way), ".1f") for way in ways))
    return table


def render_report(report: Report) -> Group:
    """The report of a run, alike layers of different blocks on one line."""
    recipe = report.recipe
    took = sum(report.seconds.values())
    count = f"{len(report.quantized) - len(report.experts)} linear layers"
    if report.experts:
        count += f" and the experts of {len(report.experts)} mixtures"
    parts: list[Any] = [Text(f"{count} run in {recipe.resolved_scheme.name} ({took:.0f} s)", style="bold")]
    if recipe.rotate:
        parts += _rotation_lines(report)
    if report.head is not None and report.head.name in report.quantized:
        parts.append(Text(_head_line(report.head)))
    if report.groups:
        parts.append(_groups_table(report.groups))
    for heading, reasons in (
        ("Not smoothed, because", report.failed),
        ("Left in floating point, because", report.skipped),
    ):
        parts += [Text(f"{heading} {reason}: {collapse(names)}") for reason, names in by_reason(reasons).items()]
    if recipe.smooth and report.unsmoothed:
        parts.append(Text(f"In 8 bits without smoothing: {collapse(report.unsmoothed)}"))
    head = [] if report.head is None else [report.head.name]
    others = [name for name in report.per_token if name not in (*report.experts, *head)]
    for reason, names in (
        ("since one does not fit all tokens", others),
        ("as experts always have", [name for name in report.per_token if name in report.experts]),
        ("as the output embedding always has", [name for name in report.per_token if name in head]),
    ):
        if names:
            parts.append(Text(f"With a scale per token, {reason}: {collapse(names)}"))
    if report.fused:
        parts.append(Text(f"Fused into one pass: {collapse(report.fused)}"))
    return Group(*parts)


def _rotation_lines(report: Report) -> list[Text]:
    rotations, kinds, lines = report.rotations, report.recipe.rotations, []
    is_left = report.recipe.chooses_rotation and not (rotations.residual or rotations.heads or rotations.inputs)
    if rotations.errors is not None:
        plain, turned = rotations.errors
        lines.append(f"Rotations change the error of the blocks that were tried from {plain:.2g} to {turned:.2g}")
    if is_left:
        lines.append(f"Nothing is rotated, because {rotations.refused}")
        return [Text(line) for line in lines]
    if rotations.residual:
        apart = f"; the head is stored apart from the embedding, {rotations.untied / 1e6:.1f} MB"
        lines.append(f"Rotated: the residual stream{apart if rotations.untied else ''}")
    elif "residual" in kinds:
        lines.append(f"The residual stream is not rotated, because {rotations.refused}")
    if rotations.heads:
        channels = ", ".join(map(str, sorted(set(rotations.heads.values()))))
        lines.append(f"Rotated: the values of attention in {len(rotations.heads)} blocks, heads of {channels} channels")
    elif "heads" in kinds:
        lines.append("The values of attention are not rotated, because no block passes them on by averages alone")
    for size in sorted(set(rotations.inputs.values())):
        names = [name for name, own in rotations.inputs.items() if own == size]
        lines.append(f"Rotated at run time, {size} channels together: the input of {collapse(names)}")
    if not rotations.inputs and "inputs" in kinds:
        lines.append("No input is rotated at run time, because no layer of a block reads a multiple of 16 channels")
    elif not rotations.inputs and "down" in kinds:
        lines.append("No input is rotated at run time, because no layer reads a multiple of 16 channels of another one")
    return [Text(line) for line in lines]


def _head_line(head: HeadReport) -> str:
    reader = f", and {head.embedding} reads its weight" if head.embedding else ""
    cost = f"it alone costs a KL divergence of {head.kl:.2g} nats a token"
    return f"In 8 bits outside of the blocks: {head.name}{reader}; {cost}"


def _groups_table(groups: Iterable[SmoothedGroup]) -> Table:
    alike: dict[str, list[SmoothedGroup]] = {}
    for group in groups:
        consumers = ", ".join(dict.fromkeys(_last(name) for name in group.consumers))
        alike.setdefault(f"{_last(group.producer) or 'explicit'} → {consumers}", []).append(group)
    table = Table(
        title="Smoothed: largest input channel over the median one, worst block",
        box=box.SIMPLE,
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("from → into")
    for heading in ("groups", "alpha", "before", "after"):
        table.add_column(heading, justify="right")
    for fold, members in alike.items():
        alphas = sorted({group.alpha for group in members})
        alpha = f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} … {alphas[-1]:g}"
        before = max(group.outlier_before for group in members)
        after = max(group.outlier_after for group in members)
        table.add_row(fold, str(len(members)), alpha, f"{before:.1f}", f"{after:.1f}")
    return table


def _ratio(size: int, first: int) -> str:
    return f"{size / first:.3f}x" if first else "–"


def _rate(speed: Speed | Throughput | None) -> str:
    return f"{speed.rows_per_second:.1f}" if isinstance(speed, Throughput) else "–"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _number(value: float | None, spec: str, factor: float = 1) -> str:
    return "–" if value is None else format(factor * value, spec)


def _error(value: float | None, spec: str, factor: float = 1) -> str:
    return "" if value is None else f" ±{format(factor * value, spec)}"
