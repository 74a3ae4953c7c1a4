"""SmoothQuant from top to bottom."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import Batch, find_blocks, token_ids
from .calibrate import calibrate
from .convert import convert_, convert_experts_
from .describe import describe_
from .discover import Discovery, discover
from .errors import SmoothQuantError
from .experts import as_experts
from .fuse import fuse_
from .hf import expert_names
from .journal import Journal, fingerprint
from .linears import check_finite_weights, select_linears
from .progress import track
from .quantize_blocks import quantize_blocks
from .scheme import Recipe
from .skipping import choose_skips
from .smooth import SmoothedGroup
from .smooth_experts import HiddenRanges
from .stream import StreamRecorder

HELD_OUT_SHARE = 4  # every fourth batch at most
HELD_OUT_TOKENS = 2048  # are enough to measure choices on

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Report:
    """What one run of ``quantize`` did.

    Attributes:
        recipe: the recipe it followed.
        quantized: names of the layers, and of the modules of experts, that now run in 8 bits.
        experts: those of them that hold the experts of a mixture.
        groups: the groups that were smoothed.
        failed: producers whose fold was undone, and producers that cannot be folded, each with the reason.
        unsmoothed: quantized layers whose input was not smoothed.
        skipped: layers left in floating point, with the reason.
        errors: squared error of each quantized layer's output on held-out rows, relative to the output's square.
        damages: the same of each decoder block's output, with all its layers quantized (see ``search.damage``).
        limits: where static scales are clipped, the largest magnitude kept relative to the largest seen, by layer.
        massive: inputs at which one token towers over the others: over the median one how much, and its position.
        per_token: layers of a static scheme whose input has a scale per token all the same, because one for all would
            not fit its tokens; experts always have.
        sensitivity: KL divergence of the model's predictions with nothing but these layers quantized, if measured.
        outliers: fp32 [K] absmax of each layer's input, before and after smoothing.
        fused: names of the norms and MLPs that run in one pass now.
        seconds: wall-clock seconds of each step.
        base: what the model was loaded from: a hub id, or the last part of a path; empty if that is not known.
        calibration: ``windows`` and ``tokens`` of the calibration data, and ``text`` where whoever read it says so.
    """

    recipe: Recipe
    quantized: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unsmoothed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    damages: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    massive: dict[str, tuple[float, int]] = field(default_factory=dict)
    per_token: list[str] = field(default_factory=list)
    sensitivity: dict[tuple[str, ...], float] = field(default_factory=dict)
    outliers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    base: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)


def quantize(
    model: Model,
    batches: Tensor | Iterable[Batch],
    recipe: Recipe | None = None,
    progress: bool = True,
    journal: str | os.PathLike[str] | None = None,
) -> Model:
    """Smooths and quantizes a causal LM in place, and returns it ready to run on 8-bit kernels.

    Args:
        model: a transformers causal LM in floating point, whose linear layers are ``nn.Linear`` or ``Conv1D``.
        batches: calibration data: one tensor of token windows [samples, T], or any iterable of token ids [B, T] or of
            dicts of forward arguments, consumed once. Every fourth window is held out, until there are enough: choices
            are measured on these.
        recipe: what to do; the default is INT8 with dynamic per-token activations.
        progress: whether to show progress bars.
        journal: a folder that takes what a search has found so far; the same call goes on from there if it was cut off.
            Removed at the end.

    Returns:
        The same object. Its ``smoothquant_report`` is a ``Report``.

    Raises:
        SmoothQuantError: nothing to quantize, a pattern that matches nothing, no calibration data, a non-finite weight
            or activation. The model is unchanged then. Or the journal cannot be written: the model is still in floating
            point then, but some blocks are smoothed.
    """
    recipe = recipe or Recipe()
    report = Report(recipe, base=_name_of(model))
    bar = _progress_bars(report, progress)
    model.eval()

    selection = select_linears(model, recipe)
    layers = {name: model.get_submodule(name) for name in (*selection.linears, *selection.experts)}
    check_finite_weights(layers)
    data = CalibrationData(batches)
    recorder = StreamRecorder(find_blocks(model))
    watched = bar(data, "Calibrating")
    records = (lambda _: True) if recipe.is_tuned else data.is_held_out
    hidden = HiddenRanges()
    within = {name: own for name, own in selection.experts.items() if recipe.smooth and own.up is not None}
    absmax = calibrate(model, layers, watched, recorder, records, hidden, within)
    for name in [name for name in layers if name not in absmax]:
        selection.linears.pop(name, None)
        selection.experts.pop(name, None)
        selection.skipped[name] = "never ran during calibration"
    seen = absmax | {f"held out {index}": token_ids(batch) for index, batch in data.held_out.items()}
    notes = Journal(Path(journal) / fingerprint(model, seen, repr(recipe)) if journal is not None else None)

    discovery = Discovery()
    if recipe.smooth:
        discovery = discover(
            model, data.first, lambda blocks: bar(blocks, "Finding smoothing groups"), absmax, selection.readings
        )
    report.calibration = {"windows": data.windows, "tokens": data.tokens}
    before = dict(absmax)
    done = quantize_blocks(
        model,
        recorder,
        set(data.held_out) if recipe.is_tuned else set(range(recorder.windows)),
        discovery.groups,
        absmax,
        data.first,
        recipe,
        notes,
        selection.experts,
        hidden,
        lambda names: bar(names, "Quantizing blocks"),
    )
    if recipe.skips:
        held_out = list(data.held_out.values())
        skips = choose_skips(
            model, done.layers, done.units, held_out, recipe, notes, lambda units: bar(units, "Measuring each layer")
        )
        report.sensitivity = {unit.layers: kl for unit, kl in skips.damages.items()}
        done.layers |= skips.dynamic
        done.per_token += skips.dynamic
        selection.skipped |= skips.reasons
        for name in skips.reasons:
            del done.layers[name], selection.linears[name]
    names = {name: expert_names(model, name, reading) for name, reading in selection.experts.items()}
    for name, layer in {**done.layers, **done.experts}.items():
        model.set_submodule(name, layer)
    rest = [name for name in selection.linears if name not in done.layers]  # outside of every block
    convert_(model, rest, absmax, recipe.resolved_scheme)
    other_experts = {name: own for name, own in selection.experts.items() if name not in done.experts}
    convert_experts_(model, other_experts, recipe.resolved_scheme)
    for name, own_names in names.items():
        as_experts(model.get_submodule(name)).names = own_names
    report.fused = fuse_(model)
    if isinstance(model, PreTrainedModel):
        describe_(model)
    notes.remove()

    smoothed = {consumer for group in done.smoothing.groups for consumer in group.consumers}
    report.quantized = [*selection.linears, *selection.experts]
    report.experts = list(selection.experts)
    report.groups = done.smoothing.groups
    report.failed = discovery.rejected | done.smoothing.failed
    report.unsmoothed = [name for name in report.quantized if name not in smoothed]
    report.skipped = selection.skipped
    report.errors, report.damages, report.limits, report.massive = done.errors, done.damages, done.limits, done.massive
    report.per_token = [name for name in done.per_token if name in selection.linears]
    if recipe.resolved_scheme.is_static:
        report.per_token += selection.experts
    report.outliers = {name: (before[name], absmax[name]) for name in before}
    model.smoothquant_report = report  # type: ignore[assignment]
    return model


class CalibrationData:
    """Batches on their way into the model; some are kept to measure on, spread evenly where their number is known.

    Attributes:
        held_out: the batches that are kept, by their number.
        windows: rows of all batches so far.
        tokens: tokens in them.
    """

    def __init__(self, batches: Tensor | Iterable[Batch]) -> None:
        self._batches = batches.split(1) if isinstance(batches, Tensor) and len(batches) else batches
        self.held_out: dict[int, Batch] = {}
        self.windows = self.tokens = 0

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a TypeError is how an iterator says that it has none

    def __iter__(self) -> Iterator[Batch]:
        stride, wanted = HELD_OUT_SHARE, 1
        for index, batch in enumerate(self._batches):
            rows, length = token_ids(batch).shape[:2]
            self.windows += rows
            self.tokens += rows * length
            if index == 0:
                tokens = rows * length
                wanted = max(1, HELD_OUT_TOKENS // max(1, tokens))
                stride = max(HELD_OUT_SHARE, operator.length_hint(self._batches) // wanted)
            if index % stride == 0 and len(self.held_out) < wanted:
                self.held_out[index] = batch
            yield batch
        if not self.held_out:
            raise SmoothQuantError("there is no calibration batch; pass at least one batch of token ids [B, T]")

    def is_held_out(self, index: int) -> bool:
        """Whether a batch that has been yielded is one to measure on."""
        return index in self.held_out

    @property
    def first(self) -> Batch:
        """The first batch, which is always held out."""
        return self.held_out[0]


def _name_of(model: nn.Module) -> str:
    """What a model was loaded from, without the folders it lies in here."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return name if name.count("/") == 1 and not Path(name).exists() else Path(name).name


def _progress_bars(report: Report, show: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
        start = time.perf_counter()
        yield from track(items, what, show)
        report.seconds[what] = time.perf_counter() - start

    return bar
