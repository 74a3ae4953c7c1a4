"""SmoothQuant from top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint.hf_names import expert_names
from ..checkpoint.naming import set_quantization_config_
from ..fusion.fuse import fuse_
from ..nn.experts import as_experts
from ..nn.finalize import finalize_
from ..probing.blocks import Batch, find_blocks, token_ids
from ..probing.smoothing_groups import Discovery, discover
from ..progress import track
from .block_inputs import StreamRecorder
from .block_quantizer import quantize_blocks
from .calibration import CalibrationData, calibrate
from .convert import convert_, convert_experts_
from .expert_smoothing import HiddenRanges
from .recipe import Recipe
from .report import Report, to_record
from .resume import Journal, fingerprint
from .selection import check_finite_weights, select_linears
from .skipping import choose_skips

Model = TypeVar("Model", bound=nn.Module)


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
        The same object. Its ``smoothquant_report`` is a ``Report``; its ``smoothquant_record``, the same in plain
        numbers and names, is what ``save`` writes.

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
        finalize_(model, refused=set_quantization_config_(model))
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
    model.smoothquant_record = to_record(report)  # type: ignore[assignment]
    return model


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
