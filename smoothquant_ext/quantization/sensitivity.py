"""How much damage each quantized layer does to the whole model, and which ones are better left alone.

The measure is the KL divergence of the model's predictions when nothing but one unit is quantized. A unit is a set of
layers that read the same input (q, k and v; gate and up): other engines compute these as one and want them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..evaluation.accuracy import log_probabilities, mean_kl
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch
from ..probing.hooks import swapped


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
    """Measures units on a model in floating point, whose outputs it remembers block by block.

    While the unit of a block is measured, the blocks before it return what they returned in floating point, so that
    only the rest of the model runs.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.remembered: list[dict[str, Any]] = []
        self.expected: list[Tensor] = []
        for batch in batches:
            outputs: dict[str, Any] = {}
            with _remembering(blocks, outputs):
                self.expected.append(log_probabilities(model, batch))
            self.remembered.append(outputs)

    def kl(self, unit: Unit, layers: Mapping[str, W8A8Linear]) -> float:
        """Mean KL(original || with the unit's layers in 8 bits), nats per token."""
        with swapped(self.model, {name: layers[name] for name in unit.layers}):
            total = 0.0
            for batch, expected, remembered in zip(self.batches, self.expected, self.remembered, strict=True):
                with self._skipping(unit.block, remembered):
                    total += mean_kl(expected, log_probabilities(self.model, batch))
        return total / len(self.batches)

    @contextmanager
    def _skipping(self, block: str, remembered: Mapping[str, Any]) -> Iterator[None]:
        """Lets the blocks that run before ``block`` return what is remembered."""
        names = list(remembered)
        earlier = names[: names.index(block)] if block in names else []
        own = {name: vars(self.blocks[name]).get("forward") for name in earlier}  # some tools set one
        try:
            for name in earlier:
                self.blocks[name].forward = _returning(remembered[name])
            yield
        finally:
            for name, forward in own.items():
                vars(self.blocks[name]).pop("forward", None)
                if forward is not None:
                    self.blocks[name].forward = forward


@contextmanager
def _remembering(blocks: Mapping[str, nn.Module], outputs: dict[str, Any]) -> Iterator[None]:
    """Puts what the blocks return into ``outputs``, in running order; nothing if one ran twice, and so after others."""
    handles = []
    again = False
    for name, block in blocks.items():

        def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
            nonlocal again
            again = again or name in outputs
            outputs[name] = output

        handles.append(block.register_forward_hook(keep))
    try:
        yield
        if again:
            outputs.clear()
    finally:
        for handle in handles:
            handle.remove()


def worst(damages: Mapping[Unit, float], count: int) -> list[Unit]:
    """The units that do the most damage per layer, of ``count`` layers together at most, the worst first."""
    chosen: list[Unit] = []
    for unit in by_damage(damages):
        if count >= len(unit.layers):
            chosen.append(unit)
            count -= len(unit.layers)
    return chosen


def by_damage(damages: Mapping[Unit, float]) -> list[Unit]:
    """The units, the one with the most damage per layer first."""
    return sorted(damages, key=lambda unit: -damages[unit] / len(unit.layers))


def fewest(total: int, is_enough: Callable[[int], bool]) -> int:
    """The least n in 0 .. total for which ``is_enough(n)``, found by bisection; ``total`` if none before is."""
    low, high = 0, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: value
