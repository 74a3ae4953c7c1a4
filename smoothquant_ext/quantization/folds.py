"""The scales that blocks were smoothed by, applied to the model itself.

Blocks are smoothed as copies. Their 8-bit layers replace most of what was folded. What stays in floating point, such as
norms, routers and layers that were left out, is folded at the end. Until then 8-bit layers can be measured in the
model as it is, which is what ``for_unsmoothed`` makes them fit for.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..nn.linear import W8A8Linear
from ..probing.copies import copy_of
from ..probing.structure import Block, Structure
from .alpha_search import Choice
from .smoothing import fold_, gather_scale


def fold_rest_(structure: Structure, folds: Mapping[str, Sequence[Choice]], replaced: Collection[str]) -> None:
    """Gives what is not ``replaced`` new parameters with the scales of its block folded in; the old ones stay whole."""
    for name, choices in folds.items():
        block = structure.blocks[name]
        members = {member for choice in choices for member in (choice.group.producer, *choice.group.consumers)}
        copies, _ = _folded(block, choices, members - set(replaced))
        for member, other in copies.items():
            module = block.find(member)
            module._parameters.update(other._parameters)
            module._buffers.update(other._buffers)


def for_unsmoothed(
    structure: Structure, folds: Mapping[str, Sequence[Choice]], layers: Mapping[str, W8A8Linear]
) -> dict[str, W8A8Linear]:
    """The 8-bit layers of smoothed blocks, made to fit in the model before it is smoothed; they share their weights.

    They divide their input by the scale themselves, and multiply their output by that of the layer that follows.
    """
    fitting = dict(layers)
    for name, choices in folds.items():
        block = structure.blocks[name]
        norms = {choice.group.producer for choice in choices if choice.group.kind == "norm"}
        _, scales = _folded(block, choices, norms)
        for choice, s in zip(choices, scales, strict=True):
            group = choice.group
            if group.producer in fitting:
                fitting[group.producer] = _with_output_times(fitting[group.producer], s)
            for consumer in fitting.keys() & group.consumers.keys():
                fitting[consumer] = _with_input_over(fitting[consumer], gather_scale(s, group.consumers[consumer]))
    return fitting


def _folded(
    block: Block, choices: Sequence[Choice], members: Collection[str]
) -> tuple[dict[str, nn.Module], list[Tensor]]:
    """Folded copies of those members of a block, and what the consumers of each group are multiplied by."""
    copies = {name: copy_of(block.find(name)) for name in sorted(members)}
    scales = []
    for choice in choices:
        group = choice.group
        consumers = {name: copies[name] for name in group.consumers if name in copies}
        scales.append(fold_(copies.get(group.producer), consumers, group, choice.s))
    return copies, scales


def _with_input_over(layer: W8A8Linear, s: Tensor) -> W8A8Linear:
    other = _shallow(layer)
    own = s.to(layer.weight_scale)
    other.smooth = own if layer.smooth is None else layer.smooth * own
    return other


def _with_output_times(layer: W8A8Linear, s: Tensor) -> W8A8Linear:
    other = _shallow(layer)
    rows = s.to(layer.weight_scale)
    other.weight_scale = layer.weight_scale * rows[:, None]
    other.scheme = replace(layer.scheme, weight="channel")
    if layer.bias is not None:
        other.bias = (layer.bias.float() * rows).to(layer.bias.dtype)
    return other


def _shallow(layer: W8A8Linear) -> W8A8Linear:
    """The same layer with buffers that can be exchanged."""
    other = copy.copy(layer)
    other._buffers = dict(layer._buffers)
    return other
