"""Measures how sensitive the model is to each quantized layer.

The measure is the KL divergence of the model's predictions when nothing but one unit is quantized. A unit is a set of
layers that share an input (q, k and v; gate and up): other engines compute these as one and want them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..evaluation.accuracy import log_probabilities, mean_kl
from ..probing.blocks import Batch
from ..probing.hooks import hooked, swapped
from ..probing.structure import Structure


@dataclass(frozen=True)
class Unit:
    """Layers that are quantized or left alone together.

    Attributes:
        block: the decoder block they are in.
        layers: their names in the model.
    """

    block: str
    layers: tuple[str, ...]


class Sensitivity:
    """Measures units on a model in floating point, and remembers the outputs of its blocks.

    While the unit of a block is measured, the blocks before it return what they returned in floating point, so that
    only the rest of the model runs.
    """

    def __init__(self, structure: Structure, batches: Sequence[Batch]) -> None:
        """Runs the model on the batches."""
        self.model, self.blocks, self.batches = structure.model, structure.modules, batches
        self.remembered: list[dict[str, Any]] = []
        self.expected: list[Tensor] = []
        for batch in batches:
            outputs: dict[str, Any] = {}
            with _remembering(self.blocks, outputs):
                self.expected.append(log_probabilities(self.model, batch))
            self.remembered.append(outputs)

    def kl(self, unit: Unit, layers: Mapping[str, nn.Module]) -> float:
        """Mean KL(original || with the unit's layers in 8 bits), nats per token."""
        with swapped(self.model, {name: layers[name] for name in unit.layers}):
            total = 0.0
            for batch, expected, remembered in zip(self.batches, self.expected, self.remembered, strict=True):
                with self._skipping(unit.block, remembered):
                    total += mean_kl(expected, log_probabilities(self.model, batch))
        return total / len(self.batches)

    @contextmanager
    def _skipping(self, block: str, remembered: Mapping[str, Any]) -> Iterator[None]:
        """Makes the blocks that run before ``block`` return their remembered outputs."""
        names = list(remembered)
        earlier = names[: names.index(block)] if block in names else []
        forwards = {name: vars(self.blocks[name]).get("forward") for name in earlier}  # some tools set one
        try:
            for name in earlier:
                self.blocks[name].forward = _returning(remembered[name])
            yield
        finally:
            for name, forward in forwards.items():
                vars(self.blocks[name]).pop("forward", None)
                if forward is not None:
                    self.blocks[name].forward = forward


@contextmanager
def _remembering(blocks: Mapping[str, nn.Module], outputs: dict[str, Any]) -> Iterator[None]:
    """Puts the blocks' outputs into ``outputs``, in running order; nothing if a block ran twice."""
    ran_again = False

    def keep(name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        nonlocal ran_again
        ran_again = ran_again or name in outputs
        outputs[name] = output

    with hooked(blocks, after=keep):
        yield
        if ran_again:
            outputs.clear()


def worst(sensitivity: Mapping[Unit, float], count: int) -> list[Unit]:
    """The units with the largest KL divergence per layer, of ``count`` layers together at most, the worst first."""
    chosen: list[Unit] = []
    for unit in worst_first(sensitivity):
        if count >= len(unit.layers):
            chosen.append(unit)
            count -= len(unit.layers)
    return chosen


def worst_first(sensitivity: Mapping[Unit, float]) -> list[Unit]:
    """The units, the one with the largest KL divergence per layer first."""
    return sorted(sensitivity, key=lambda unit: -sensitivity[unit] / len(unit.layers))


def fewest(total: int, is_enough: Callable[[int], bool]) -> int:
    """The least n in 0 .. total for which ``is_enough(n)``, found by bisection; ``total`` if none before is."""
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value
