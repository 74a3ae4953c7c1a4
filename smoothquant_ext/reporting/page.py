"""Renders one self-contained HTML page about a quantized checkpoint: how it was made, and what that cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..checkpoint.atomic import replace_file
from ..layer_names import by_reason, collapse
from ..scheme import SCHEMES
from .facts import Facts, Kind
from .figures import Pictures, decibels, log_limits
from .tables import COLUMNS, Measured, comparison_cells

TEMPLATE = Path(__file__).with_name("page.html.j2")
BRIGHTEST = 99.8  # percentile of the magnitudes: a single token's must not take the colours from all others
NAMED = 4  # layers with the same reason are all named, up to so many
ROUNDING = {
    "nearest": "to the nearest value",
    "clip": "to the nearest value, the scale of each channel clipped for the least error",
    "gptq": "GPTQ: the error of each column is made up for in the next ones",
}
CLIPPING = {
    "absmax": "of the largest calibrated magnitude",
    "percentile": "of a high percentile of the magnitudes",
    "mse": "with the least squared error of the input",
    "kl": "with the least KL divergence of the input’s histogram",
    "auto": "for each input the one with the least error of the block’s output",
}


def write_page(
    record: Mapping[str, Any],
    path: str | os.PathLike[str],
    title: str,
    measured: Sequence[Measured] | None = None,
    weight_bytes: int | None = None,
) -> None:
    """Writes the page; a write that is killed leaves the old file or none.

    Args:
        record: the result of ``record.read_record``.
        path: the file to write.
        title: the name of the model.
        measured: the original and the checkpoint, if they were measured.
        weight_bytes: size of the checkpoint's weights, if known.

    Raises:
        SmoothQuantError: matplotlib is not installed, or the file cannot be written.
    """
    replace_file(Path(path), render_page(record, title, measured or (), weight_bytes))


def render_page(
    record: Mapping[str, Any], title: str, measured: Sequence[Measured] = (), weight_bytes: int | None = None
) -> str:
    """The page's HTML; see ``write_page``."""
    facts, pictures = Facts(record), Pictures()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        record=record,
        tiles=_tiles(facts, measured, weight_bytes),
        quality=_quality(measured),
        outliers=_outliers(facts, pictures),
        alphas=_alphas(facts, pictures),
        errors=_errors(facts, pictures),
        sensitivity=_sensitivity(facts, pictures),
        skipped=_exact_reasons(record["skipped"]),
        failed=[(reason, _named(names)) for reason, names in by_reason(record["failed"]).items()],
        unsmoothed=", ".join(_named(facts.quantized_where("alpha", None))) if record["recipe"]["smooth"] else "",
        per_token=", ".join(_named(facts.quantized_where("per_token", True))),
        massive=[
            (name, f"{layer['massive'][0]:,.0f}", layer["massive"][1])
            for name, layer in record["layers"].items()
            if layer["massive"] is not None
        ],
        limits=_limits([layer["limit"] for layer in record["layers"].values() if layer["limit"] is not None]),
        recipe=_recipe(record["recipe"]),
        seconds=[(what, _duration(seconds)) for what, seconds in record["seconds"].items()],
        total=_duration(sum(record["seconds"].values())),
    )


def _tiles(facts: Facts, measured: Sequence[Measured], weight_bytes: int | None) -> list[tuple[str, str, str]]:
    """The most important numbers: heading, number, what it means."""
    record = facts.record
    quantized, skipped = len(record["quantized"]), len(record["skipped"])
    scheme = SCHEMES.get(record["recipe"]["scheme"])
    meaning = ""
    if scheme is not None:
        weight = "a scale per output channel" if scheme.weight == "channel" else "one scale for each matrix"
        activation = "one calibrated scale for each input" if scheme.is_static else "a scale per token"
        meaning = f"weights: {weight}; activations: {activation}"
    tiles = [
        ("Scheme", record["recipe"]["scheme"], meaning),
        ("Layers in 8 bits", f"{quantized} of {quantized + skipped}", "linear layers; the others in floating point"),
    ]
    if weight_bytes is not None:
        tiles.append(("Size", f"{weight_bytes / 1e6:,.1f} MB", "all weights, on disk"))
    changes = [model.evaluation.change for model in measured[1:] if model.evaluation.change is not None]
    if changes:
        tiles.append(("Perplexity", f"{100 * changes[0]:+.2f} %", "against the original"))
    if facts.kinds:
        kind = max(facts.kinds.values(), key=lambda kind: kind.worst)
        block = int(np.nanargmax(kind.ratio_before))
        values = f"{_ratio(kind.worst)} → {_ratio(kind.ratio_after[block])}"
        meaning = f"times the median channel: block {block}, input of {kind.label}"
        tiles.append(("Worst outlier", values, meaning))
    return tiles


def _quality(measured: Sequence[Measured]) -> dict[str, Any] | None:
    if not measured:
        return None
    rows = comparison_cells(measured, errors=True)
    short = [Path(row[0]).name for row in rows]
    if len(set(short)) == len(short):
        rows = [[name, *row[1:]] for name, row in zip(short, rows, strict=True)]
    has_speed = any(model.speed for model in measured)
    keep = [has_speed or "tok/s" not in column.heading for column in COLUMNS]
    speed = next((model.speed for model in measured if model.speed), None)
    return {
        "headings": [column.heading for column, kept in zip(COLUMNS, keep, strict=True) if kept],
        "rows": [[row[0], *(cell for cell, kept in zip(row[1:], keep, strict=True) if kept)] for row in rows],
        "tokens": f"{measured[0].evaluation.tokens:,}",
        "speed": speed,
    }


def _outliers(facts: Facts, pictures: Pictures) -> dict[str, Any] | None:
    kinds = sorted(facts.kinds.values(), key=lambda kind: -kind.worst)
    if not kinds:
        return None
    limits = {kind.label: log_limits(kind.before, kind.after, top=BRIGHTEST) for kind in kinds}
    ratios = log_limits(*(values for kind in kinds for values in (kind.ratio_before, kind.ratio_after)))
    maps = [
        {
            "label": kind.label,
            "pictures": [
                Markup(
                    pictures.channels(
                        f"{what} smoothing", values, limits[kind.label], _heat_description(kind, what, values)
                    )
                )
                for what, values in (("Before", kind.before), ("After", kind.after))
            ],
        }
        for kind in kinds
    ]
    lines = [
        Markup(pictures.ratios(kind, (0.8 * min(1.25, ratios[0]), 1.6 * ratios[1]), _ratio_description(kind)))
        for kind in facts.kinds.values()
    ]
    rows = [
        (
            kind.label,
            f"{_ratio(kind.worst)} → {_ratio(float(np.nanmax(kind.ratio_after)))}",
            f"{_ratio(float(np.nanmedian(kind.ratio_before)))} → {_ratio(float(np.nanmedian(kind.ratio_after)))}",
        )
        for kind in kinds
    ]
    return {"maps": maps, "lines": lines, "rows": rows}


def _heat_description(kind: Kind, what: str, values: Any) -> str:
    return (
        f"Heat map of the channels of the input of {kind.label}, {what.lower()} smoothing: "
        f"magnitudes from {np.nanmin(values):.2g} to {np.nanmax(values):.3g}."
    )


def _ratio_description(kind: Kind) -> str:
    return (
        f"Largest over median channel of the input of {kind.label}, by block: before smoothing up to "
        f"{_ratio(kind.worst)}, after it up to {_ratio(float(np.nanmax(kind.ratio_after)))}."
    )


def _alphas(facts: Facts, pictures: Pictures) -> dict[str, Any] | None:
    if not facts.record["groups"]:
        return None
    drawn, by_block = [], []
    for kind in facts.kinds.values():
        values = [alpha for _, alpha in kind.alphas]
        said = f"from {min(values):g} to {max(values):g} in {_count(len(values), 'group')}" if values else "none"
        unsmoothed = f"; {_count(len(kind.unsmoothed), 'block')} not smoothed" if kind.unsmoothed else ""
        drawn.append(Markup(pictures.alphas(kind, len(facts.blocks), f"Alpha of {kind.label}: {said}{unsmoothed}.")))
    for number, block in enumerate(facts.blocks):
        cells = []
        for kind in facts.kinds.values():
            alphas = sorted({f"{alpha:.3g}" for at, alpha in kind.alphas if at == number})
            alphas += ["not smoothed"] if number in kind.unsmoothed else []
            cells.append(alphas[0] if len(alphas) == 1 else f"{alphas[0]} … {alphas[-1]}" if alphas else "–")
        by_block.append((block, cells))
    return {"pictures": drawn, "labels": list(facts.kinds), "by_block": by_block}


def _errors(facts: Facts, pictures: Pictures) -> dict[str, Any] | None:
    drawn = []
    worst = ""
    if facts.errors:
        layer, errors = max(facts.errors.items(), key=lambda item: float(np.nanmax(item[1], initial=0)))
        block = int(np.nanargmax(errors)) if np.isfinite(errors).any() else 0
        worst = f"the largest is that of {layer} in block {block}, {_decibels(errors[block])}"
        said = f"Heat map of the error of each layer’s output, by block; {worst}."
        drawn.append(Markup(pictures.errors(facts.errors, facts.left_out, said)))
    if np.isfinite(facts.block_errors).any():
        block = int(np.nanargmax(facts.block_errors))
        said = f"Error of each block’s output; the largest is block {block}’s, {_decibels(facts.block_errors[block])}."
        drawn.append(Markup(pictures.block_errors(facts.block_errors, said)))
    return {"pictures": drawn, "worst": worst, "dots": bool(facts.left_out)} if drawn else None


def _sensitivity(facts: Facts, pictures: Pictures) -> dict[str, Any] | None:
    units = facts.sensitivity
    if not units:
        return None
    total = sum(max(0.0, kl) for _, kl, _ in units)
    out = [kl for _, kl, is_out in units if is_out]
    share = 100 * sum(out) / total if total else 0.0
    name, kl, _ = units[0]
    return {
        "pictures": [
            Markup(
                pictures.worst_units(units, f"Bars of the most sensitive layers; the first is {name}, {kl:.2g} nats.")
            ),
            Markup(
                pictures.shares(units, f"{len(out)} of {len(units)} units make up {share:.0f} % of the divergence.")
            ),
        ],
        "units": len(units),
        "out": len(out),
        "share": f"{share:.0f} %",
    }


def _exact_reasons(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """Each reason, amounts included, with the layers it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [(reason, _named(layers)) for reason, layers in names.items()]


def _named(names: Sequence[str]) -> list[str]:
    """The names, or where they are many, their patterns with the number of names of each."""
    return list(names) if len(names) <= NAMED else [collapse(names)]


def _limits(limits: Sequence[float]) -> str:
    if not limits:
        return ""
    clipped = [limit for limit in limits if limit < 1]
    if not clipped:
        return f"The static scales of {_count(len(limits), 'layer')} keep the largest calibrated magnitude."
    return (
        f"Static scales are clipped in {len(clipped)} of {_count(len(limits), 'layer')}: they represent magnitudes up "
        f"to {min(clipped):.0%} to {max(clipped):.0%} of the largest calibrated one; the few beyond saturate."
    )


def _recipe(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The recipe in words."""
    scheme = SCHEMES.get(recipe["scheme"])
    alpha = recipe["alpha"]
    rows = [("Scheme", recipe["scheme"])]
    if not recipe["smooth"]:
        rows.append(("Smoothing", "none"))
    else:
        searched = "searched for each group by the error of its block’s output"
        rows.append(("Alpha", searched if isinstance(alpha, str) else f"{alpha:g}, the same for all groups"))
        rows.append(("Explicit scales", "where no layer can be folded" if recipe["explicit"] else "no, folds only"))
    rows.append(("Weights rounded", ROUNDING.get(recipe["rounding"], recipe["rounding"])))
    if scheme is not None and scheme.is_static:
        rows.append(("Static scales", CLIPPING.get(recipe["clipping"], recipe["clipping"])))
    if recipe["auto_skip"]:
        count = recipe["auto_skip"]
        most = _count(int(count), "layer") if count >= 1 else f"{100 * count:.3g} % of the layers"
        rows.append(("Left out by sensitivity", f"up to {most}"))
    if recipe["max_ppl_increase"]:
        rows.append(("Perplexity may rise", f"{100 * recipe['max_ppl_increase']:.3g} % on calibration text"))
    rows += [(what, ", ".join(recipe[key])) for what, key in (("Skip", "skip"), ("Only", "only")) if recipe[key]]
    return rows


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _decibels(error: float) -> str:
    return f"{decibels(np.array(error)):.0f} dB".replace("-", "−")


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60} s"
