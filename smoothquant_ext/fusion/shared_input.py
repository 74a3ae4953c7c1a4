"""8-bit layers that read the same tensor, such as q, k and v: the first one that is called computes all.

The layers stay where they are and are called one by one, as their model does. The first call of a group quantizes the
input once, multiplies it with all the weights in one op and keeps the other results; a call of another layer with the
very same tensor takes its own. A call with any other tensor computes its layer alone, so that the result never depends
on who calls what: only the speed does. On a GPU the weights of a group lie one after the other in memory, and the op
multiplies them as one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import ops
from ..nn.linear import W8A8Linear, have_one_input_scale, join_
from ..nn.placement import has_ops
from ..probing.blocks import Batch, run_model
from ..probing.example_inputs import example_inputs
from ..probing.hooks import hooked
from ..probing.trying import Failed, attempt
from ..probing.values import first_argument, version_of


class SharedInput:
    """A group of layers, and the results that wait for being fetched."""

    def __init__(self, layers: list[W8A8Linear]) -> None:
        self.layers = layers
        self._waiting: tuple[Tensor, int, dict[W8A8Linear, Tensor]] | None = None

    def __call__(self, layer: W8A8Linear, x: Tensor) -> Tensor | None:
        """The layer's output for x; ``None`` where the layer has to compute it by itself."""
        if torch.compiler.is_compiling():  # no graph can ask whether x has changed
            return None
        waiting = self._waiting  # read once: another thread may exchange it
        if waiting is not None and waiting[0] is x and waiting[1] == version_of(x):
            result = waiting[2].pop(layer, None)
            if not waiting[2]:
                self._waiting = None
            if result is not None:
                return result
        if layer is not self.layers[0] or not self._is_here(x):
            return None
        layers = ops.as_lists(member.tensors for member in self.layers)
        first, *others = ops.w8a8_linear_group(x, *layers, layer.input_scale, rotate=layer.rotate)
        self._waiting = (x, version_of(x), dict(zip(self.layers[1:], others, strict=True)))
        return first

    def _is_here(self, x: Tensor) -> bool:
        """Whether all layers are where x is; accelerate may have taken some away until they are called."""
        return has_ops(x) and all(layer.is_with(x) for layer in self.layers)

    def join_(self) -> None:
        """Joins the layers if they are together on a GPU."""
        join_(self.layers)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_waiting": None}


def share_inputs_(model: nn.Module) -> list[str]:
    """Forms the groups of a model of transformers, seen in one pass over two tokens; their names."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, W8A8Linear)}
    if not isinstance(model, PreTrainedModel) or not layers:
        return []
    names = []
    for group in _same_inputs(model, layers):
        shared = SharedInput([layers[name] for name in group])
        for layer in shared.layers:
            layer.shared = shared
        shared.join_()
        parent = group[0].rpartition(".")[0]
        names.append(f"{parent}.{'+'.join(name.rpartition('.')[2] for name in group)}")
    return names


def _same_inputs(model: PreTrainedModel, layers: dict[str, W8A8Linear]) -> list[list[str]]:
    """Names of layers that got the same tensor, in the order of their calls, and can be computed together."""
    inputs: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that none takes the place of another

    def note(name: str, args: tuple[Tensor, ...], kwargs: Any) -> None:
        x = first_argument(args, kwargs)
        if inputs and inputs[-1][0] is x:
            inputs[-1][1].append(name)
        else:
            inputs.append((x, [name]))

    def run(inputs_of_model: Batch) -> None:
        inputs.clear()
        with hooked(layers, before=note):
            run_model(model, inputs_of_model)

    if all(isinstance(attempt(partial(run, each), model), Failed) for each in example_inputs(model)):
        return []  # a model that wants other inputs runs its layers one by one
    calls = [name for _, names in inputs for name in names]
    groups = [[name for name in names if calls.count(name) == 1] for _, names in inputs]
    return [group for group in groups if len(group) > 1 and _fit_together([layers[name] for name in group])]


def _fit_together(layers: list[W8A8Linear]) -> bool:
    """On one device for good, of one scheme, all with a bias or none, and with one scale of the input."""
    first = layers[0]
    is_alike = all(layer.scheme == first.scheme and (layer.bias is None) == (first.bias is None) for layer in layers)
    is_here = all(has_ops(layer.weight) and layer.weight.device == first.weight.device for layer in layers)
    return is_here and is_alike and have_one_input_scale(layers)
