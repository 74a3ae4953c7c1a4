"""Activation outliers of every layer before and after smoothing: measures them, tabulates them and draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ..devices import full_float32, memory_explained
from ..errors import SmoothQuantError
from ..layer_names import name_pattern
from ..probing.numerics import outlier_ratio
from ..probing.smoothing_groups import Group, discover
from ..probing.structure import Structure, find_structure
from ..progress import track
from ..quantization.calibration import CalibrationData, calibrate
from ..quantization.placement import place_
from ..quantization.recipe import Recipe
from ..quantization.report import SmoothedGroup
from ..quantization.selection import select_linears
from ..quantization.smoothing import Proof, by_block, group_modules, magnitudes, smooth_group_

MOST_COLUMNS = 8


@dataclass(frozen=True)
class LayerInput:
    """The input of one or several linear layers of a block.

    Attributes:
        block: name of the decoder block.
        linears: names, within the block, of the layers that share this input.
        before: fp32 [K], largest magnitude of each channel over the calibration text.
        after: the same after smoothing; equal to ``before`` where nothing could be folded.
    """

    block: str
    linears: tuple[str, ...]
    before: Tensor
    after: Tensor

    @property
    def ratio_before(self) -> float:
        """Largest channel over the median one."""
        return outlier_ratio(self.before)

    @property
    def ratio_after(self) -> float:
        """The same after smoothing."""
        return outlier_ratio(self.after)

    @property
    def label(self) -> str:
        """The input's name in tables: the layers' last names, numbers (of experts) left out."""
        names = [name_pattern(name) for name in self.linears]
        shared = names[0].rpartition(".")[0]
        last = [name.rpartition(".")[2] for name in names]
        return ", ".join(dict.fromkeys(last)) if "*" not in shared else f"{shared}.{'/'.join(dict.fromkeys(last))}"


def measure_outliers(
    model: nn.Module,
    batches: Any,
    recipe: Recipe | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
) -> list[LayerInput]:
    """Calibrates a model, smooths it in place, and measures the inputs of its linear layers before and after.

    Args:
        model: a transformers model in floating point; its function stays the same.
        batches: calibration data, as in ``quantize``.
        recipe: which layers and which alpha; ``Recipe()`` by default.
        progress: whether to show progress bars on stderr.
        device: where to compute, as in ``quantize``.

    Raises:
        SmoothQuantError: as ``quantize`` does.
    """
    with memory_explained("give shorter windows (--seqlen), or the device cpu"), full_float32():
        return _measure_outliers(model, CalibrationData(model.eval(), batches), recipe or Recipe(), progress, device)


def _measure_outliers(
    model: nn.Module, data: CalibrationData, recipe: Recipe, progress: bool, device: torch.device | str | None
) -> list[LayerInput]:

    def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
        return track(items, what, progress)

    model.eval()
    placement = place_(model, device, progress)
    structure = find_structure(model, data.first)
    selection = select_linears(structure, recipe)
    with placement.running(structure, unchanged=True):
        measured = calibrate(model, selection.modules(model), bar(data, "Calibrating"))
    absmax = {name: channels.cpu() for name, channels in measured.items()}
    there = placement.blocks_of(structure)
    before = dict(absmax)
    if recipe.smooth:
        groups = discover(there, lambda blocks: bar(blocks, "Finding smoothing groups")).groups
        smooth_(there, groups, absmax, recipe, lambda blocks: bar(blocks, "Smoothing"))
    return _layer_inputs(structure, before, absmax)


def outlier_table(inputs: Sequence[LayerInput]) -> Table:
    """Largest over median channel, before -> after: a row per block and a column per input of a block."""
    labels = list(dict.fromkeys(layer.label for layer in inputs))
    table = Table(
        title="Largest input channel over the median one, before → after smoothing",
        box=box.SIMPLE,
        pad_edge=False,
        title_justify="left",
    )
    table.add_column("block")
    if len(labels) > MOST_COLUMNS:
        table.add_column("input of")
        table.add_column("outliers", justify="right")
        for (block, label), worst in _by_block_and_label(inputs).items():
            table.add_row(block, label, _arrow(worst))
        return table
    for label in labels:
        table.add_column(label, justify="right")
    cells = _by_block_and_label(inputs)
    for block in dict.fromkeys(layer.block for layer in inputs):
        table.add_row(block, *(_arrow(cells.get((block, label), [])) for label in labels))
    return table


def plot_outliers(inputs: Sequence[LayerInput], path: str | PathLike[str], title: str = "") -> None:
    """Draws the same as a picture, and the channels of the worst layer (PNG, SVG or PDF, by the name's ending).

    Raises:
        SmoothQuantError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
    except ImportError as error:
        raise SmoothQuantError("a plot needs matplotlib: run pip install 'smoothquant-ext[plots]'") from error
    labels = list(dict.fromkeys(layer.label for layer in inputs))[:MOST_COLUMNS]
    cells = _by_block_and_label(inputs)
    blocks = list(dict.fromkeys(layer.block for layer in inputs))
    figure = Figure(figsize=(2.6 * max(len(labels), 3) + 1, 7), layout="constrained")
    grid = figure.add_gridspec(2, len(labels))
    shared = None
    for column, label in enumerate(labels):
        axes = figure.add_subplot(grid[0, column], sharey=shared)
        shared = shared or axes
        drawn = [(i, cells[block, label]) for i, block in enumerate(blocks) if (block, label) in cells]
        for what, color, pick in (("before", "#c1440e", _worst_before), ("after", "#1f6f8b", _worst_after)):
            axes.plot([i for i, _ in drawn], [pick(c) for _, c in drawn], marker=".", color=color, label=what)
        axes.set(title=label, yscale="log", xlabel="block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("largest / median channel")
    figure.axes[0].legend()

    worst = max(inputs, key=lambda layer: layer.ratio_before)
    axes = figure.add_subplot(grid[1, :])
    order = worst.before.argsort(descending=True)
    axes.plot(worst.before[order].cpu(), color="#c1440e", label="before")
    axes.plot(worst.after[order].cpu(), color="#1f6f8b", label="after", linewidth=0.8)
    axes.set(
        title=f"the worst input: {worst.block}.{worst.label}",
        xlabel="input channel, sorted by magnitude before smoothing",
        ylabel="largest magnitude",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    if title:
        figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"the picture {path} cannot be written: {error}") from error


def _layer_inputs(structure: Structure, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[LayerInput]:
    """Groups the layers of each block whose inputs have channels of equal magnitudes, to the last bit."""
    inputs: list[LayerInput] = []
    members: dict[str, list[str]] = {}
    for name in before:
        block = next((block.name for block in structure.blocks.values() if block.holds(name)), "")
        members.setdefault(block, []).append(name)
    for block, names in members.items():
        while names:
            alike = [name for name in names if _equal(before, name, names[0]) and _equal(after, name, names[0])]
            local = tuple(name.removeprefix(f"{block}.") for name in alike)
            inputs.append(LayerInput(block, local, before[names[0]], after[names[0]]))
            names = [name for name in names if name not in alike]
    return inputs


def _equal(tensors: Mapping[str, Tensor], a: str, b: str) -> bool:
    return tensors[a].shape == tensors[b].shape and torch.equal(tensors[a], tensors[b])


def _by_block_and_label(inputs: Sequence[LayerInput]) -> dict[tuple[str, str], list[LayerInput]]:
    cells: dict[tuple[str, str], list[LayerInput]] = {}
    for layer in inputs:
        cells.setdefault((layer.block, layer.label), []).append(layer)
    return cells


def _worst_before(layers: Sequence[LayerInput]) -> float:
    return max(layer.ratio_before for layer in layers)


def _worst_after(layers: Sequence[LayerInput]) -> float:
    return max(layer.ratio_after for layer in layers)


def _arrow(layers: Sequence[LayerInput]) -> str:
    return f"{_worst_before(layers):.1f} → {_worst_after(layers):.1f}" if layers else "–"


@dataclass
class Smoothing:
    """The groups that were smoothed, and by producer the reasons why others were not."""

    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def smooth_(
    structure: Structure,
    groups: Iterable[Group],
    absmax: dict[str, Tensor],
    recipe: Recipe,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Smoothing:
    """Folds smoothing with one alpha into a model in place, and updates ``absmax`` to the smoothed activations.

    Args:
        structure: of the causal LM, in floating point.
        groups: its smoothing groups.
        absmax: calibrated absmax [K] of each layer to be quantized; groups that feed none of them are left alone.
        recipe: its alpha, and its scheme's weight granularity, decide s.
        progress: wraps the iterable of blocks.
    """
    result = Smoothing()
    members = by_block(groups, absmax)
    for name in progress(list(members)):
        block = structure.blocks[name]
        proof = Proof(block)
        for group in members[name]:
            consumers = group_modules(block, group)[1]
            s = magnitudes(group, consumers, absmax, recipe.resolved_scheme).scale(recipe.migration)
            outcome = smooth_group_(proof, group, s, recipe.migration, absmax)
            if isinstance(outcome, str):
                result.failed[group.producer] = outcome
            else:
                result.groups.append(outcome)
    return result
