"""Decides whether rotating a model pays, by the error of some of its blocks, quantized with and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..probing.blocks import Batch
from ..probing.smoothing_groups import discover
from ..probing.state import State
from ..probing.structure import Structure, find_structure
from ..probing.trying import untouched
from ..traits import embedding_of
from .block_inputs import BlockInputRecorder
from .block_quantizer import Run, quantize_blocks
from .calibration import Calibration, calibrate, rotated_ranges
from .expert_smoothing import HiddenRanges
from .placement import Placement
from .recipe import Recipe
from .report import LayerReport, Report, Rotations
from .resume import SearchState
from .rotation import rotate_

MOST_BLOCKS = 8  # that the choice is measured on, spread evenly over the model
ROTATED_DTYPES = (torch.int8,)  # FP8 has as many steps for small values as for large ones: it loses by a rotation


class Trial(NamedTuple):
    """What the error is measured of."""

    blocks: tuple[str, ...]
    layers: Sequence[str]
    batch: Batch
    recipe: Recipe
    placement: Placement


def rotate_if_better_(
    structure: Structure,
    layers: Sequence[str],
    batch: Batch,
    recipe: Recipe,
    placement: Placement,
    progress: Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]],
) -> Rotations:
    """Rotates a model in the ways that the recipe allows, and undoes it if its quantized blocks are no better then.

    It makes no model larger: the residual stream is left alone where the head shares its weight with the embedding.

    Args:
        structure: of the model in floating point.
        layers: names of the layers and experts that are to be quantized.
        batch: held-out calibration data.
        recipe: whose scheme, smoothing and alpha count; weights are rounded to nearest.
        placement: where the blocks run.
        progress: makes a progress bar with a title.
    """
    scheme = recipe.resolved_scheme
    if scheme.dtype not in ROTATED_DTYPES:
        return Rotations(refused=f"{scheme.name} loses by a rotation")
    kinds, shared = recipe.rotations, _shared_head(structure.model)
    if shared:
        kinds = tuple(kind for kind in kinds if kind != "residual")
    if not kinds:
        return Rotations(refused=shared)
    holding = [name for name in structure.called if any(structure.blocks[name].holds(layer) for layer in layers)]
    step = max(1, math.ceil(len(holding) / MOST_BLOCKS))
    simple = replace(recipe, alpha=recipe.migration, rounding="nearest", clipping="absmax", rotate=())
    trial = Trial(tuple(holding[step // 2 :: step]), layers, batch, simple, placement)
    plain = _mean_error(trial, structure, Rotations(), progress("Trying blocks as they are"))
    before = State(structure.model)
    rotations = rotate_(structure, batch, kinds, placement, progress("Rotating"))
    rotations.refused = rotations.refused or shared
    structure = find_structure(structure.model, batch)  # its blocks' calls are rotated now
    turned = _mean_error(trial, structure, rotations, progress("Trying rotated blocks"))
    if turned < plain:
        rotations.errors = plain, turned
        return rotations
    before.restore_()
    return Rotations(refused="its blocks are no better for it", errors=(plain, turned))


def _mean_error(
    trial: Trial, structure: Structure, rotations: Rotations, progress: Callable[[Iterable[Any]], Iterable[Any]]
) -> float:
    """The mean over the trial's blocks of the error of their output, quantized (see ``alpha_search.block_error``)."""
    recipe, placement = trial.recipe, trial.placement
    names = [name for name in trial.layers if any(structure.blocks[block].holds(name) for block in trial.blocks)]
    modules = {name: structure.model.get_submodule(name) for name in names}
    recorder = BlockInputRecorder({name: structure.modules[name] for name in trial.blocks})
    hidden = HiddenRanges({}, {})
    with placement.running(structure, unchanged=True), untouched(structure.model):
        rotated = rotated_ranges(rotations.inputs, recipe.resolved_scheme)
        absmax = calibrate(structure.model, modules, [trial.batch], recorder, hidden=hidden, rotated=rotated)
    absmax = {name: channels.cpu() for name, channels in absmax.items()}
    report = Report(recipe, rotations=rotations)
    report.layers = {name: LayerReport(channels, channels) for name, channels in absmax.items()}
    calibration = Calibration(absmax, recorder, frozenset(range(recorder.windows)), hidden)
    run = Run(recipe, structure, calibration, placement, SearchState(None), report)
    called = replace(structure, called=trial.blocks)
    groups = discover(placement.blocks_of(called), running=absmax).groups if recipe.smooth else []
    quantize_blocks(run, groups, progress)
    errors = [block.error for block in report.blocks.values()]
    return sum(errors) / len(errors) if errors else math.inf


def _shared_head(model: nn.Module) -> str:
    """Why a rotation of the residual stream would make a model larger, or ''."""
    weights: list[Any] = [getattr(embedding_of(model, kind), "weight", None) for kind in ("output", "input")]
    head, embedding = weights
    if not isinstance(head, Tensor) or head is not embedding:
        return ""
    size = f"{head.nbytes / 1e6:.1f} MB"
    return f"its head would not share the token embedding's weight then, {size} more (--rotate residual,heads does it)"
