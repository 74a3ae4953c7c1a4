"""The pictures of the report page, each a small SVG that stays legible on a telephone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ..errors import SmoothQuantError
from .facts import Floats, Kind

WIDTH = 4.2  # inches; with 8.5 points of type, legible down to half that width
BEFORE, AFTER, OTHER = "#c1440e", "#1f6f8b", "#9aa0a6"
STYLE = {
    "svg.fonttype": "none",  # real text, in the reader's font
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
MOST_BARS = 12
MOST_ROWS = 24  # of layers in a heat map
NO_ALPHA = -0.15  # where a group without alpha is drawn


class Pictures:
    """Draws pictures as inline SVG. All that one object draws may stand on one page: their ids differ.

    Every method returns the text of an ``<svg>`` with a description for those who do not see it.

    Raises:
        SmoothQuantError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        try:
            import matplotlib
        except ImportError as error:
            raise SmoothQuantError("a report needs matplotlib: run pip install 'smoothquant-ext[plots]'") from error
        self._context = matplotlib.rc_context
        self._count = 0

    def channels(self, title: str, values: Floats, limits: tuple[float, float], description: str) -> str:
        """Heat map of absmax [blocks, bins], colours between ``limits`` on a log scale."""
        from matplotlib.colors import LogNorm

        def draw(figure: Any, axes: Any) -> None:
            shown = np.where(values > 0, values, np.where(np.isnan(values), np.nan, limits[0]))
            image = axes.imshow(
                shown, cmap="inferno", norm=LogNorm(*limits), aspect="auto", interpolation="nearest", origin="lower"
            )
            axes.set(title=title, xlabel="channels, neighbours binned", ylabel="block")
            axes.grid(visible=False)
            _whole_numbers(axes.yaxis)
            _plain_numbers(figure.colorbar(image, label="largest magnitude", pad=0.02, extend="max").ax.yaxis)

        return self._svg(draw, 2.9, description)

    def ratios(self, kind: Kind, limits: tuple[float, float], description: str) -> str:
        """Largest over median channel of one kind of input, block by block, before and after smoothing."""

        def draw(_: Any, axes: Any) -> None:
            axes.plot(kind.ratio_before, marker=".", color=BEFORE, label="before")
            axes.plot(kind.ratio_after, marker=".", color=AFTER, label="after")
            axes.set(title=kind.label, xlabel="block", ylabel="largest / median channel", yscale="log", ylim=limits)
            _whole_numbers(axes.xaxis)
            _plain_numbers(axes.yaxis)
            axes.legend(loc="upper right", ncols=2)

        return self._svg(draw, 2.3, description)

    def alphas(self, kind: Kind, blocks: int, description: str) -> str:
        """The alpha of each group of one kind, and the blocks that have none."""

        def draw(_: Any, axes: Any) -> None:
            axes.plot(*zip(*kind.alphas, strict=True) if kind.alphas else ([], []), "o", color=AFTER, markersize=4)
            axes.axhline(NO_ALPHA / 2, color=OTHER, linewidth=0.6)
            axes.plot(kind.unsmoothed, [NO_ALPHA] * len(kind.unsmoothed), "x", color=BEFORE, markersize=5)
            axes.set(title=kind.label, xlabel="block", ylabel="alpha", ylim=(NO_ALPHA - 0.08, 1.05))
            axes.set(xlim=(-0.7, blocks - 0.3))
            axes.set_yticks([NO_ALPHA, 0, 0.25, 0.5, 0.75, 1], ["none", "0", "0.25", "0.5", "0.75", "1"])
            _whole_numbers(axes.xaxis)

        return self._svg(draw, 1.9, description)

    def errors(self, errors: Mapping[str, Floats], left_out: Collection[tuple[str, int]], description: str) -> str:
        """Heat map of the error of each layer, dB; a dot on those that stayed in floating point."""
        names = list(errors)[:MOST_ROWS]

        def draw(figure: Any, axes: Any) -> None:
            image = axes.imshow(
                decibels(np.array([errors[name] for name in names])),
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
            )
            dots = [(number, names.index(name)) for name, number in left_out if name in names]
            if dots:
                axes.plot(*zip(*dots, strict=True), "o", color="white", markeredgecolor="black", markersize=4)
            axes.set_yticks(range(len(names)), [_last_two(name, names) for name in names])
            axes.set(title="Each layer’s output", xlabel="block")
            axes.grid(visible=False)
            _whole_numbers(axes.xaxis)
            figure.colorbar(image, label="squared error, dB", pad=0.02)

        return self._svg(draw, max(2.4, 0.2 * len(names) + 0.8), description)

    def block_errors(self, errors: Floats, description: str) -> str:
        """The error of each block's output, dB."""

        def draw(_: Any, axes: Any) -> None:
            axes.plot(decibels(errors), marker=".", color=AFTER)
            axes.set(title="Each block’s output", xlabel="block", ylabel="squared error, dB")
            _whole_numbers(axes.xaxis)

        return self._svg(draw, 2.4, description)

    def worst_units(self, units: Sequence[tuple[str, float, bool]], description: str) -> str:
        """Bars of the most sensitive units; other colours for those that were left in floating point."""
        shown = units[:MOST_BARS]

        def draw(_: Any, axes: Any) -> None:
            colors = [BEFORE if is_out else AFTER for _, _, is_out in shown]
            axes.barh(range(len(shown)), [kl for _, kl, _ in shown], color=colors)
            axes.set_yticks(range(len(shown)), [name for name, _, _ in shown])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set(title="The most sensitive layers", xlabel="KL divergence, nats per token")
            axes.ticklabel_format(axis="x", style="plain")
            axes.locator_params(axis="x", nbins=4)
            _legend(axes, {"left in floating point": BEFORE, "in 8 bits": AFTER}, "lower right")

        return self._svg(draw, 0.2 * len(shown) + 0.9, description)

    def shares(self, units: Sequence[tuple[str, float, bool]], description: str) -> str:
        """The share of the most sensitive units in the sum of all KL divergences."""
        share = np.cumsum([max(0.0, kl) for _, kl, _ in units])
        share = 100 * share / max(share[-1], np.finfo(float).tiny)

        def draw(_: Any, axes: Any) -> None:
            axes.plot(range(1, len(share) + 1), share, color=OTHER, linewidth=1)
            for color, picked in ((BEFORE, True), (AFTER, False)):
                numbers = [number for number, (_, _, is_out) in enumerate(units) if is_out == picked]
                axes.plot([number + 1 for number in numbers], share[numbers], ".", color=color, markersize=5)
            axes.set(
                title="How the divergence is spread",
                xlabel="units, the most sensitive first",
                ylabel="% of the sum of all",
                ylim=(0, 104),
            )
            _whole_numbers(axes.xaxis)
            _legend(axes, {"left in floating point": BEFORE, "in 8 bits": AFTER}, "lower right")

        return self._svg(draw, 0.2 * min(MOST_BARS, len(units)) + 0.9, description)

    def _svg(self, draw: Callable[[Any, Any], None], height: float, description: str) -> str:
        from matplotlib.figure import Figure

        self._count += 1
        with self._context(STYLE | {"svg.hashsalt": f"picture {self._count}"}), io.StringIO() as file:
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure, figure.add_subplot())
            figure.savefig(file, format="svg", transparent=True)
            return _inline(file.getvalue(), f"p{self._count}-", description)


def decibels(errors: Floats) -> Floats:
    """10 log10 of squared errors, at least -120 dB."""
    return 10 * np.log10(np.where(np.isnan(errors), np.nan, np.maximum(errors, 1e-12)))


def log_limits(*values: Floats, top: float = 100) -> tuple[float, float]:
    """The limits of a log scale: from the first to the ``top`` percentile of the positive values."""
    known = np.concatenate([value[np.isfinite(value) & (value > 0)] for value in values])
    if not len(known):
        return 0.1, 1.0
    low, high = float(np.percentile(known, 1)), float(np.percentile(known, top))
    return (low, high) if high > low else (low / 2, high * 2)


def _inline(svg: str, prefix: str, description: str) -> str:
    """An SVG file as an element of a page: as wide as its place, without what only files need, ids made unique."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    label = escape(description, quote=True)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    return f'<svg {box[0]} role="img" aria-label="{label}">{svg[svg.index(">") + 1 :]}'


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True))


def _plain_numbers(axis: Any) -> None:
    """Ticks of a log axis as 0.1, 2, 30; some in between where the axis is short of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, colors: Mapping[str, str], place: str) -> None:
    from matplotlib.patches import Patch

    axes.legend(handles=[Patch(color=color, label=label) for label, color in colors.items()], loc=place)


def _last_two(name: str, among: Sequence[str]) -> str:
    """The last part of a layer's name, with the one before it where that alone would be ambiguous."""
    last = name.rpartition(".")[2]
    alike = sum(other.rpartition(".")[2] == last for other in among)
    return last if alike == 1 else ".".join(name.split(".")[-2:])
