"""Leaves layers out of 8 bits: the few whose quantization costs the predictions the most."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ..errors import SmoothQuantError
from ..evaluation.accuracy import log_likelihood, logits_of
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch, count_tokens
from ..probing.hooks import swapped
from ..probing.structure import Structure
from ..traits import predicts_next_token
from .recipe import Recipe
from .resume import SearchState
from .sensitivity import Sensitivity, Unit, fewest, worst, worst_first

MOST_TOKENS = 1024  # that each layer is measured on
# A scale per token is the remedy where it leaves no more than this share of the static scale's KL divergence.
LEFT_BY_DYNAMIC = 0.25

MEASUREMENTS = "sensitivity"  # their name in the search state


@dataclass
class Skips:
    """Which layers stay in floating point or switch to dynamic scales, and why.

    Attributes:
        sensitivity: KL divergence of the model's predictions, nats per token, when nothing but that unit is quantized.
        reasons: for each layer that stays in floating point, why.
        dynamic: the replacements of layers of a static scheme that have a scale per token instead.
    """

    sensitivity: dict[Unit, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    dynamic: dict[str, W8A8Linear] = field(default_factory=dict)

    def leave_out(self, unit: Unit) -> None:
        """Keeps a unit in floating point."""
        what = "it alone costs" if len(unit.layers) == 1 else "with what shares its input it costs"
        for name in unit.layers:
            self.reasons[name] = f"{what} a KL divergence of {self.sensitivity[unit]:.2g} nats a token"
            self.dynamic.pop(name, None)


def check_measurable(structure: Structure, recipe: Recipe) -> None:
    """Refuses a recipe that chooses layers by predictions for a model that makes none.

    Raises:
        SmoothQuantError: as said, or a limit of perplexity for a model that is no causal language model.
    """
    kind = type(structure.model).__name__
    if recipe.max_ppl_increase is not None and not predicts_next_token(structure.model):
        raise SmoothQuantError(
            f"{kind} does not continue texts, so it has no perplexity for --max-ppl-increase: give --auto-skip"
        )
    if recipe.skips:
        try:
            logits_of(structure.model, structure.batch)
        except SmoothQuantError as error:
            raise SmoothQuantError(
                f"{error}: without them --auto-skip cannot choose, name layers with --skip"
            ) from None


def choose_skips(
    structure: Structure,
    layers: Mapping[str, nn.Module],
    units: Sequence[Unit],
    batches: Sequence[Batch],
    recipe: Recipe,
    state: SearchState,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Skips:
    """Measures every unit and chooses by the recipe's ``auto_skip`` and ``max_ppl_increase``.

    Args:
        structure: of the model in floating point, smoothed.
        layers: its 8-bit layers by name, not in the model; those that are in no unit stay whatever is chosen.
        units: the sets of layers that are left out together.
        batches: held-out calibration data.
        recipe: how many to leave out, or how good the model has to be.
        state: keeps the measurements.
        progress: wraps the iterable of units.
    """
    model, skips = structure.model, Skips()
    sensitivity = Sensitivity(structure, first_tokens(batches))
    _, measured = state.read(MEASUREMENTS) or ({}, {})
    for unit in progress(units):
        key = unit.layers[0]
        if key not in measured:
            measured[key] = sensitivity.kl(unit, layers)
            state.write(MEASUREMENTS, {}, measured)
        skips.sensitivity[unit] = measured[key]

    order = worst_first(skips.sensitivity)
    total = sum(len(unit.layers) for unit in units)
    count = recipe.auto_skip if recipe.auto_skip >= 1 else recipe.auto_skip * total
    chosen = worst(skips.sensitivity, int(count))
    if recipe.max_ppl_increase is not None:
        needed = _enough_for_perplexity(model, layers, order, batches, recipe.max_ppl_increase)
        chosen = list(dict.fromkeys([*chosen, *order[:needed]]))
    recovered_by_dynamic: list[Unit] = []
    for unit in chosen:
        static = unit.layers if recipe.resolved_scheme.is_static else ()
        dynamic = {name: with_dynamic_scale(cast(W8A8Linear, layers[name])) for name in static}
        if dynamic and sensitivity.kl(unit, dynamic) <= LEFT_BY_DYNAMIC * skips.sensitivity[unit]:
            skips.dynamic |= dynamic
            recovered_by_dynamic.append(unit)
        else:
            skips.leave_out(unit)
    if recovered_by_dynamic and recipe.max_ppl_increase is not None:  # they still cost a little, perhaps too much
        rest = {name: layer for name, layer in {**layers, **skips.dynamic}.items() if name not in skips.reasons}
        needed = _enough_for_perplexity(model, rest, recovered_by_dynamic, batches, recipe.max_ppl_increase)
        for unit in recovered_by_dynamic[:needed]:
            skips.leave_out(unit)
    return skips


def _enough_for_perplexity(
    model: nn.Module, layers: Mapping[str, nn.Module], order: Sequence[Unit], batches: Sequence[Batch], limit: float
) -> int:
    """The number of units, the first of ``order``, that have to stay in floating point, with the rest of ``layers`` in
    8 bits, for the perplexity to rise by ``limit`` at most.
    """
    original = log_likelihood(model, batches)

    def is_enough(count: int) -> bool:
        left_out = {name for unit in order[:count] for name in unit.layers}
        rest = {name: layer for name, layer in layers.items() if name not in left_out}
        with swapped(model, rest):
            return math.expm1(original - log_likelihood(model, batches)) <= limit

    return fewest(len(order), is_enough)


def with_dynamic_scale(layer: W8A8Linear) -> W8A8Linear:
    """The same layer with a scale per token; it shares the weight."""
    other = copy.copy(layer)
    other._buffers = dict(layer._buffers, input_scale=None)
    other.scheme = layer.scheme.per_token
    return other


def first_tokens(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, up to ``MOST_TOKENS``, one at least."""
    chosen: list[Batch] = []
    tokens = 0
    for batch in batches:
        count = count_tokens(batch)
        if chosen and tokens + count > MOST_TOKENS:
            break
        chosen.append(batch)
        tokens += count
    return chosen
