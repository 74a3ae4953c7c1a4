"""SmoothQuant from top to bottom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from .blocks import Batch
from .calibrate import calibrate
from .convert import convert_
from .discover import Discovery, discover
from .errors import SmoothQuantError
from .fuse import fuse_
from .linears import check_finite_weights, select_linears
from .progress import track
from .scheme import Recipe
from .smooth import SmoothedGroup, Smoothing, smooth_

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Report:
    """What one run of ``quantize`` did.

    Attributes:
        recipe: the recipe it followed.
        quantized: names of the layers that now run in 8 bits.
        groups: the groups that were smoothed.
        failed: producers whose fold was undone, and producers that cannot be folded, each with the reason.
        unsmoothed: quantized layers whose input was not smoothed.
        skipped: layers left in floating point, with the reason.
        fused: names of the norms and MLPs that run in one pass now.
        seconds: wall-clock seconds of each step.
    """

    recipe: Recipe
    quantized: list[str] = field(default_factory=list)
    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unsmoothed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def quantize(
    model: Model, batches: Tensor | Iterable[Batch], recipe: Recipe | None = None, progress: bool = True
) -> Model:
    """Smooths and quantizes a causal LM in place, and returns it ready to run on 8-bit kernels.

    Args:
        model: a transformers causal LM in floating point, whose linear layers are ``nn.Linear`` or ``Conv1D``.
        batches: calibration data: one tensor of token windows [samples, T], or any iterable of token ids [B, T] or of
            dicts of forward arguments, consumed once.
        recipe: what to do; the default is INT8 with dynamic per-token activations.
        progress: whether to show progress bars.

    Returns:
        The same object. Its ``smoothquant_report`` is a ``Report``.

    Raises:
        SmoothQuantError: nothing to quantize, a pattern that matches nothing, no calibration data, a non-finite weight
            or activation. The model is unchanged then.
    """
    recipe = recipe or Recipe()
    scheme = recipe.resolved_scheme
    report = Report(recipe)
    bar = _progress_bars(report, progress)
    model.eval()

    selection = select_linears(model, recipe)
    check_finite_weights(selection.linears)
    first, batches = _peek(list(batches.split(1)) if isinstance(batches, Tensor) and len(batches) else batches)

    absmax = calibrate(model, selection.linears, bar(batches, "Calibrating"))
    for name in [name for name in selection.linears if name not in absmax]:
        del selection.linears[name]
        selection.skipped[name] = "never ran during calibration"

    discovery, smoothing = Discovery(), Smoothing()
    if recipe.smooth:
        discovery = discover(model, first, lambda blocks: bar(blocks, "Finding smoothing groups"))
        smoothing = smooth_(model, discovery.groups, absmax, first, recipe, lambda blocks: bar(blocks, "Smoothing"))

    convert_(model, bar(list(selection.linears), "Quantizing weights"), absmax, scheme)
    report.fused = fuse_(model)

    smoothed = {consumer for group in smoothing.groups for consumer in group.consumers}
    report.quantized = list(selection.linears)
    report.groups = smoothing.groups
    report.failed = discovery.rejected | smoothing.failed
    report.unsmoothed = [name for name in selection.linears if name not in smoothed]
    report.skipped = selection.skipped
    model.smoothquant_report = report  # type: ignore[assignment]
    return model


def _peek(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and an iterable that still yields it; a sequence keeps its length for the progress bar."""
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise SmoothQuantError("there is no calibration batch; pass at least one batch of token ids [B, T]") from None
    return first, batches if hasattr(batches, "__len__") else itertools.chain([first], iterator)


def _progress_bars(report: Report, show: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    def bar(items: Iterable[Any], what: str) -> Iterable[Any]:
        start = time.perf_counter()
        yield from track(items, what, show)
        report.seconds[what] = time.perf_counter() - start

    return bar
