"""Sorts a checkpoint's record by decoder block and by kind of input, for the pictures of the report page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..layer_names import name_pattern
from .outliers import LayerInput

Floats = NDArray[np.float64]


@dataclass
class Kind:
    """The inputs of one kind, such as those of q, k and v, in all blocks.

    Attributes:
        label: the layers that consume it.
        before: [blocks, bins] absmax of each bin of channels before smoothing, NaN where a block has no such input.
        after: the same after smoothing.
        ratio_before: [blocks] largest channel over the median one, of the block's worst input; NaN where it has none.
        ratio_after: the same after smoothing.
        alphas: block number and migration strength of each smoothed group.
        unsmoothed: numbers of the blocks with an input that was not smoothed.
    """

    label: str
    before: Floats
    after: Floats
    ratio_before: Floats
    ratio_after: Floats
    alphas: list[tuple[int, float]] = field(default_factory=list)
    unsmoothed: list[int] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest ratio before smoothing."""
        return float(np.nanmax(self.ratio_before, initial=0))


class Facts:
    """The facts of a record, by block.

    Attributes:
        blocks: names of the decoder blocks, in order.
        kinds: the kinds of inputs, by label, in the order in which a block has them.
        block_errors: [blocks] error of each block's output, NaN where it is not known.
        errors: for each layer's name within its block [blocks] its error, NaN where a block has no such layer. Of
            several experts the worst.
        left_out: the cells of ``errors`` (layer, block number) that were measured but left in floating point.
        sensitivity: for each unit, the one with the largest KL divergence first: its name, its KL divergence, whether
            it was left in floating point.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.blocks: list[str] = list(record["blocks"])
        self.block_errors: Floats = _finite([block["error"] for block in record["blocks"].values()])
        self._numbers = {name: number for number, name in enumerate(self.blocks)}
        self._labels: dict[str, str] = {}
        self.kinds = self._kinds()
        self._add_alphas()
        self.errors, self.left_out = self._errors()
        units = sorted(record["sensitivity"], key=lambda unit: -float(unit["kl"]))
        self.sensitivity = [
            (
                self._unit_name(unit["layers"]),
                float(unit["kl"]),
                any(name in record["skipped"] for name in unit["layers"]),
            )
            for unit in units
        ]

    def quantized_where(self, fact: str, value: object) -> list[str]:
        """Names of the quantized layers whose ``fact`` has a value."""
        layers = self.record["layers"]
        return [name for name in self.record["quantized"] if name in layers and layers[name][fact] == value]

    def place(self, name: str) -> tuple[int, str] | None:
        """The number of the block that a layer is in and the layer's name there; ``None`` outside of all blocks."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            block = ".".join(parts[:end])
            if block in self._numbers:
                return self._numbers[block], ".".join(parts[end:])
        return None

    def _kinds(self) -> dict[str, Kind]:
        layers: Mapping[str, Any] = self.record["layers"]
        inputs: dict[tuple[Any, ...], list[str]] = {}  # layers of a block whose inputs are equal
        for name, layer in layers.items():
            if (place := self.place(name)) is not None:
                inputs.setdefault((place[0], tuple(layer["before"]), tuple(layer["after"])), []).append(name)
        members: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
        for (number, before, after), names in inputs.items():
            local = tuple(name.removeprefix(f"{self.blocks[number]}.") for name in names)
            label = LayerInput(self.blocks[number], local, torch.tensor(before), torch.tensor(after)).label
            self._labels |= dict.fromkeys(names, label)
            members.setdefault(label, []).append((number, layers[names[0]]))
        return {label: self._kind(label, inputs_of_kind) for label, inputs_of_kind in members.items()}

    def _kind(self, label: str, members: Sequence[tuple[int, Mapping[str, Any]]]) -> Kind:
        bins = max(len(layer["before"]) for _, layer in members)

        def worst(what: str, width: int | None = None) -> Floats:
            values = np.full((len(self.blocks), width or 1), np.nan)
            for number, layer in members:
                row = _finite(layer[what] if width else [layer[what]])
                values[number, : len(row)] = np.fmax(values[number, : len(row)], row)
            return values if width else values[:, 0]

        return Kind(label, worst("before", bins), worst("after", bins), worst("ratio_before"), worst("ratio_after"))

    def _add_alphas(self) -> None:
        for group in self.record["groups"]:
            number, _ = self.place(group["consumers"][0]) or (None, "")
            if number is not None and group["consumers"][0] in self._labels:
                self.kinds[self._labels[group["consumers"][0]]].alphas.append((number, float(group["alpha"])))
        for name, label in self._labels.items():
            place, kind = self.place(name), self.kinds[label]
            is_smoothed = self.record["layers"][name]["alpha"] is not None
            if not is_smoothed and place is not None and place[0] not in kind.unsmoothed:
                kind.unsmoothed.append(place[0])

    def _errors(self) -> tuple[dict[str, Floats], set[tuple[str, int]]]:
        errors: dict[str, Floats] = {}
        left_out = set()
        for name, facts in self.record["layers"].items():
            if facts["error"] is not None and (place := self.place(name)) is not None:
                number, layer = place[0], name_pattern(place[1])
                row = errors.setdefault(layer, np.full(len(self.blocks), np.nan))
                row[number] = np.fmax(row[number], _finite([facts["error"]])[0])
                if name in self.record["skipped"]:
                    left_out.add((layer, number))
        return errors, left_out

    def _unit_name(self, layers: Sequence[str]) -> str:
        number, local = self.place(layers[0]) or (None, layers[0])
        return local if number is None else f"block {number}: {self._labels.get(layers[0], local)}"


def _finite(values: Sequence[float | None]) -> Floats:
    """The values, NaN for those that are no finite number."""
    return np.array([value if value is not None and math.isfinite(value) else np.nan for value in values], float)
