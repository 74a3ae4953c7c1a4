"""Which layers are better left out of 8 bits: the few that do most of the damage."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..evaluation.accuracy import log_likelihood
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch, find_blocks, token_ids
from ..probing.hooks import swapped
from .recipe import Recipe
from .resume import Journal
from .sensitivity import Sensitivity, Unit, by_damage, fewest, worst

MOST_TOKENS = 1024  # that each layer is measured on
DYNAMIC_CURES = 0.25  # of the damage of a static scale may be left for a scale per token to be the remedy

FINDINGS = "sensitivity"


@dataclass
class Skips:
    """The verdict.

    Attributes:
        damages: KL divergence of the model's predictions, nats per token, when nothing but that unit is quantized.
        reasons: for each layer that stays in floating point, why.
        dynamic: layers that a static scheme runs with a scale per token instead: their replacements.
    """

    damages: dict[Unit, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    dynamic: dict[str, W8A8Linear] = field(default_factory=dict)

    def leave_out(self, unit: Unit) -> None:
        """Keeps a unit in floating point."""
        what = "it alone costs" if len(unit.layers) == 1 else "with what shares its input it costs"
        for name in unit.layers:
            self.reasons[name] = f"{what} a KL divergence of {self.damages[unit]:.2g} nats a token"
            self.dynamic.pop(name, None)


def choose_skips(
    model: nn.Module,
    layers: Mapping[str, W8A8Linear],
    units: Sequence[Unit],
    batches: Sequence[Batch],
    recipe: Recipe,
    journal: Journal,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Skips:
    """Measures every unit and chooses as the recipe's ``auto_skip`` or ``max_ppl_increase`` says.

    Args:
        model: the causal LM in floating point, smoothed.
        layers: its 8-bit layers by name, not in the model.
        units: the sets of layers that are left out together.
        batches: held-out calibration data.
        recipe: how many, or how good.
        journal: takes and gives the measurements.
        progress: wraps the iterable of units.
    """
    skips = Skips()
    sensitivity = Sensitivity(model, find_blocks(model), _some(batches))
    _, known = journal.read(FINDINGS) or ({}, {})
    for unit in progress(units):
        key = unit.layers[0]
        if key not in known:
            known[key] = sensitivity.kl(unit, layers)
            journal.write(FINDINGS, {}, known)
        skips.damages[unit] = known[key]

    order = by_damage(skips.damages)
    total = sum(len(unit.layers) for unit in units)
    count = recipe.auto_skip if recipe.auto_skip >= 1 else recipe.auto_skip * total
    chosen = worst(skips.damages, int(count))
    if recipe.max_ppl_increase is not None:
        needed = _enough_for_perplexity(model, layers, order, batches, recipe.max_ppl_increase)
        chosen = list(dict.fromkeys([*chosen, *order[:needed]]))
    cured: list[Unit] = []
    for unit in chosen:
        dynamic = {name: _per_token(layers[name]) for name in unit.layers} if recipe.resolved_scheme.is_static else {}
        if dynamic and sensitivity.kl(unit, dynamic) <= DYNAMIC_CURES * skips.damages[unit]:
            skips.dynamic |= dynamic
            cured.append(unit)
        else:
            skips.leave_out(unit)
    if cured and recipe.max_ppl_increase is not None:  # a cure leaves some damage, which may be too much
        rest = {name: layer for name, layer in {**layers, **skips.dynamic}.items() if name not in skips.reasons}
        for unit in cured[: _enough_for_perplexity(model, rest, cured, batches, recipe.max_ppl_increase)]:
            skips.leave_out(unit)
    return skips


def _enough_for_perplexity(
    model: nn.Module, layers: Mapping[str, W8A8Linear], order: Sequence[Unit], batches: Sequence[Batch], limit: float
) -> int:
    """How many units of ``order`` have to stay in floating point, with the rest of ``layers`` in 8 bits, for the
    perplexity to rise by ``limit`` at most.
    """
    original = log_likelihood(model, batches)

    def is_enough(count: int) -> bool:
        left_out = {name for unit in order[:count] for name in unit.layers}
        rest = {name: layer for name, layer in layers.items() if name not in left_out}
        with swapped(model, rest):
            return math.expm1(original - log_likelihood(model, batches)) <= limit

    return fewest(len(order), is_enough)


def _per_token(layer: W8A8Linear) -> W8A8Linear:
    """The same layer with a scale per token; it shares the weight."""
    other = copy.copy(layer)
    other._buffers = dict(layer._buffers, input_scale=None)
    other.scheme = layer.scheme.per_token
    return other


def _some(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, up to ``MOST_TOKENS``, one at least."""
    chosen: list[Batch] = []
    tokens = 0
    for batch in batches:
        count = token_ids(batch).shape[:2].numel()
        if chosen and tokens + count > MOST_TOKENS:
            break
        chosen.append(batch)
        tokens += count
    return chosen
