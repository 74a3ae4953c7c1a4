"""SmoothQuant from top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.hf_names import expert_names
from ..checkpoint.naming import set_quantization_config_
from ..devices import full_float32, memory_explained
from ..errors import SmoothQuantError
from ..fusion.fuse import fuse_
from ..nn.experts import as_experts
from ..nn.finalize import finalize_
from ..ops.backends import check_cpu_isa
from ..probing.blocks import Batch, run_model, token_ids
from ..probing.hooks import replace_
from ..probing.smoothing_groups import Discovery, discover
from ..probing.structure import Structure, find_structure
from ..probing.trying import Failed, attempt, untouched
from ..progress import track
from .block_inputs import BlockInputRecorder
from .block_quantizer import QuantizedBlocks, Run, quantize_blocks
from .calibration import Calibration, CalibrationData, calibrate, rotated_ranges
from .convert import convert_, convert_experts_
from .expert_smoothing import HiddenRanges
from .folds import fold_rest_, for_unsmoothed
from .head import HeadQuantizer
from .placement import place_
from .recipe import Recipe
from .report import LayerReport, Report, UnitReport
from .restoring import unchanged_on_error
from .resume import SearchState, fingerprint
from .rotation import rotate_
from .rotation_choice import rotate_if_better_
from .selection import Selection, check_finite_weights, select_linears
from .sensitivity import Unit
from .skipping import check_measurable, choose_skips, first_tokens, with_dynamic_scale

Model = TypeVar("Model", bound=nn.Module)
Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]


def quantize(
    model: Model,
    batches: Any,
    recipe: Recipe | None = None,
    progress: bool = True,
    journal: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Smooths and quantizes a model in place, and returns it ready to run on 8-bit kernels.

    Args:
        model: a model in floating point, of any class of transformers or of your own, whose linear layers are
            ``nn.Linear`` or ``Conv1D``. What computes its answer (an output embedding, the head of a classifier) stays
            in floating point.
        batches: calibration data: one tensor of token windows [samples, T], or any iterable of token ids [B, T] or of
            dicts of forward arguments, as tensors, arrays or lists, consumed once. A batch with padding, by its
            ``attention_mask`` or because its rows are of different lengths, is cut into rows without: padding counts
            nowhere. Every fourth batch is held out, until there are enough: choices are measured on these.
        recipe: what to do; the default is INT8 with dynamic per-token activations.
        progress: whether to show progress bars.
        journal: a folder that keeps the results of a search while it runs; the same call resumes there if it was cut
            off. Removed at the end.
        device: where to compute: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, ``"auto"``, or ``None``, where the model is. The
            model moves there if it fits with what quantization needs. Otherwise it stays, and its blocks go there one
            after the other, as copies; then the result is where the model was.

    Returns:
        The same object. Its ``smoothquant_report`` is a ``Report``; its ``smoothquant_record``, the same in plain
        numbers and names, is what ``save`` writes.

    Raises:
        SmoothQuantError: nothing to quantize, a pattern that matches nothing, no calibration data or data of another
            form or vocabulary, a non-finite weight or activation, a journal that cannot be written, a GPU that is
            absent or too small. After these, as after any other exception, the model is what it was, where it was.
    """
    check_cpu_isa()
    remedy = "give shorter windows (--seqlen), fewer of them in a batch, or the device cpu"
    with unchanged_on_error(model), memory_explained(remedy), full_float32():
        _quantize(model, CalibrationData(model.eval(), batches), recipe or Recipe(), progress, journal, device)
    return model


def _quantize(
    model: nn.Module,
    data: CalibrationData,
    recipe: Recipe,
    progress: bool,
    journal: str | os.PathLike[str] | None,
    device: torch.device | str | None,
) -> None:
    report = Report(recipe, base=_name_of(model))
    bar = _progress_bars(report, progress)
    model.eval()
    placement = place_(model, device, progress)
    structure = find_structure(model, data.first)
    check_measurable(structure, recipe)
    selection = select_linears(structure, recipe)
    check_finite_weights(selection.modules(model))
    if recipe.chooses_rotation:
        report.rotations = rotate_if_better_(structure, selection.names, data.first, recipe, placement, bar)
    elif recipe.rotate:
        report.rotations = rotate_(structure, data.first, recipe.rotations, placement, bar("Rotating"))
    if recipe.rotate:
        structure = find_structure(model, data.first)  # its blocks' calls are rotated now

    head = HeadQuantizer(structure, recipe, selection)
    with placement.running(structure, unchanged=True), untouched(model):
        rotated = report.rotations.inputs
        calibration = _calibrate(structure, selection, data, recipe, rotated, head, bar("Calibrating"))
    report.calibration = {"windows": data.windows, "tokens": data.tokens}
    report.layers = {name: LayerReport(absmax, absmax) for name, absmax in calibration.absmax.items()}
    for name in selection.names:
        if name not in calibration.absmax:
            selection.skip(name, "never ran during calibration")
    measured = calibration.absmax | {f"held out {index}": token_ids(batch) for index, batch in data.held_out.items()}
    state = SearchState(Path(journal) / fingerprint(model, measured, repr(recipe)) if journal is not None else None)
    run = Run(recipe, structure, calibration, placement, state, report)
    head.quantize(first_tokens(list(data.held_out.values())), placement, bar)

    discovery = Discovery()
    if recipe.smooth:
        discovery = discover(placement.blocks_of(structure), bar("Finding smoothing groups"), calibration.absmax)
    report.failed |= discovery.rejected
    quantized = quantize_blocks(run, discovery.groups, bar("Quantizing blocks"))
    if recipe.skips:
        with placement.running(structure), untouched(model):
            held_out = list(data.held_out.values())
            _leave_out_worst(run, selection, quantized, head.modules, held_out, bar("Measuring each layer"))

    _install_(run, selection, quantized, head.modules)
    report.fused = fuse_(model)
    outcome = attempt(lambda: run_model(model, structure.batch), model)
    if isinstance(outcome, Failed):
        raise SmoothQuantError(
            f"with 8-bit layers {outcome.reason}: leave the layers that it needs in floating point with --skip"
        ) from outcome.error
    if isinstance(model, PreTrainedModel):
        finalize_(model, refused=set_quantization_config_(model))
    state.remove()

    report.head = head.report
    if head.report is not None and head.layer is not None:
        report.layers[head.report.name] = head.layer
    of_head = list(head.modules)[:1]  # the token embedding multiplies nothing
    report.quantized = [*selection.names, *of_head]
    report.experts, report.skipped = list(selection.experts), selection.skipped
    for name in selection.experts:
        report.layers[name].per_token = recipe.resolved_scheme.is_static
    model.smoothquant_report = report  # type: ignore[assignment]
    model.smoothquant_record = report.to_record()  # type: ignore[assignment]


def _calibrate(
    structure: Structure,
    selection: Selection,
    data: CalibrationData,
    recipe: Recipe,
    rotated: Mapping[str, int],
    head: HeadQuantizer,
    progress: Progress,
) -> Calibration:
    """Runs the model over the data: absmax of every selected layer, calls of every block, ranges within experts, and
    what the head reads.
    """
    layers = selection.modules(structure.model)
    rotated = rotated_ranges(rotated, recipe.resolved_scheme)
    recorder = BlockInputRecorder(structure.modules)
    smoothed = selection.experts if recipe.smooth else {}
    hidden = HiddenRanges(layers, {name: each for name, each in smoothed.items() if f"{name}.down" not in rotated})
    records = (lambda _: True) if recipe.is_tuned else data.is_held_out
    watched = layers | head.watched  # so that it is given all tokens
    with head.collecting(data):
        absmax = calibrate(structure.model, watched, progress(data), recorder, records, hidden, rotated)
    for name in head.watched:
        absmax.pop(name, None)  # of those that it was left with
    held_out = data.held_out if recipe.is_tuned else range(recorder.windows)  # numbers of recorded windows
    absmax = {name: channels.cpu() for name, channels in absmax.items()}  # outlives the run, in the report
    return Calibration(absmax, recorder, frozenset(held_out), hidden)


def _leave_out_worst(
    run: Run,
    selection: Selection,
    quantized: QuantizedBlocks,
    head: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    progress: Progress,
) -> None:
    """Leaves the layers out that the recipe's limits ask for, or gives them dynamic scales, in ``quantized`` too."""
    report, linears = run.report, quantized.linears
    fitting = {**for_unsmoothed(run.structure, quantized.folds, linears), **head}
    units = [Unit(name, layers) for name, block in report.blocks.items() for layers in block.inputs]
    skips = choose_skips(run.structure, fitting, units, batches, run.recipe, run.state, progress)
    report.sensitivity = [UnitReport(unit.layers, kl) for unit, kl in skips.sensitivity.items()]
    linears |= {name: with_dynamic_scale(linears[name]) for name in skips.dynamic}
    for name in skips.dynamic:
        report.layers[name].per_token = True
    for name, reason in skips.reasons.items():
        selection.skip(name, reason)
        del linears[name]


def _install_(run: Run, selection: Selection, quantized: QuantizedBlocks, head: Mapping[str, nn.Module]) -> None:
    """Puts the 8-bit modules in their places, smooths what stays in floating point, and converts the selected layers
    that are outside of all blocks.
    """
    model, scheme, rotated = run.structure.model, run.recipe.resolved_scheme, run.report.rotations.inputs
    int8_modules: dict[str, nn.Module] = {**quantized.linears, **quantized.experts}
    names = {name: expert_names(model, name, layout) for name, layout in selection.experts.items()}
    fold_rest_(run.structure, quantized.folds, int8_modules)
    replace_(model, {**int8_modules, **head})
    others = [name for name in selection.linears if name not in int8_modules]
    convert_(model, others, run.calibration.absmax, scheme, rotated)
    outside = {name: layout for name, layout in selection.experts.items() if name not in int8_modules}
    convert_experts_(model, outside, scheme, rotated)
    for name, layer_names in names.items():
        as_experts(model.get_submodule(name)).names = layer_names


def _name_of(model: nn.Module) -> str:
    """The hub id or the directory name that a model was loaded from, without the folders above it."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    return name if name.count("/") == 1 and not Path(name).exists() else Path(name).name


def _progress_bars(report: Report, show: bool) -> Callable[[str], Progress]:
    """For the name of a step a progress bar that reports the step's duration."""

    def bar(step: str) -> Progress:
        def timed(items: Iterable[Any]) -> Iterable[Any]:
            start = time.perf_counter()
            yield from track(items, step, show)
            report.seconds[step] = time.perf_counter() - start

        return timed

    return bar
