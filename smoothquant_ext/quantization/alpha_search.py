"""Searches the migration strength of each smoothing group by the error of its decoder block's output.

The block exists twice: once in fp32, where groups are folded by one scale after the other, and once quantized just as
it will run, on the real kernels. For each candidate the quantized copy gets the folded, rounded weights, and its output
on held-out calibration windows is compared with that of the original block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..nn.linear import W8A8Linear
from ..probing.blocks import BlockCall
from ..probing.copies import copy_of
from ..probing.hooks import replace_
from ..probing.linears import as_linear
from ..probing.smoothing_groups import Group
from ..probing.structure import Block
from ..scheme import Scheme
from .convert import quantize_experts, quantize_linear, rotation_of_experts, static_scale
from .smoothing import fold_, gather_scale, group_modules, magnitudes

GRID = tuple(step / 10 for step in range(11))
REFINED = (-0.05, 0.05)  # around the best of the grid


@dataclass(frozen=True)
class Choice:
    """The choice for one group: s [C] and the alpha behind it, ``None`` where the group is best left alone."""

    group: Group
    alpha: float | None
    s: Tensor


def block_error(outputs: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """Squared error of a block's outputs, relative to the size of the expected outputs.

    The sum of two means. One is over tokens, each relative to itself, because the next norm divides by their size. The
    other is over everything, relative to everything, and so belongs to the few tokens of massive activations (Sun et
    al. 2024), which all others attend to: the first mean would hardly show their loss.
    """
    tokens, whole = 0.0, 0.0
    for window, reference in zip(outputs, expected, strict=True):
        hidden, wanted = _hidden(window), _hidden(reference)
        if hidden is None or wanted is None:
            continue
        actual, wanted = hidden.double(), wanted.to(hidden.device, torch.float64)
        error, size = (actual - wanted).square().sum(-1), wanted.square().sum(-1)
        tiny = torch.finfo(torch.float32).tiny
        tokens += float((error / size.clamp(min=tiny)).mean())
        whole += float(error.sum() / size.sum().clamp(min=tiny))
    return (tokens + whole) / max(1, len(outputs))


class Trial:
    """One block in two copies, and the scale by which each group is folded at the moment.

    Attributes:
        block: the original.
        absmax: fp32 [K] by model-wide name, of the unsmoothed inputs of the layers that are quantized.
        scheme: to which these are quantized.
        rotated: of layers that rotate their input the size of its blocks, by model-wide name.
        float_block: the folded copy in fp32.
        int8_block: the copy whose layers are quantized; of FP8 schemes too.
        folds: each folded group and its scale, by the group's id.
    """

    def __init__(
        self,
        block: Block,
        absmax: Mapping[str, Tensor],
        scheme: Scheme,
        calls: Sequence[BlockCall],
        expected: Sequence[list[Tensor]],
        schemes: Mapping[str, Scheme],
        rotated: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Quantizes the layers of the block that ``absmax`` names.

        Args:
            block: the original; it is left as it is.
            absmax: fp32 [K] by model-wide name, of the unsmoothed inputs.
            scheme: to which layers are quantized.
            calls: arguments of the block for the held-out windows.
            expected: the original's outputs for them.
            schemes: by model-wide name, of layers that are quantized by another scheme.
            rotated: of layers that rotate their input the size of its blocks, by model-wide name.
        """
        self.block = block
        self.scheme, self.calls, self.expected, self.schemes = scheme, calls, expected, schemes
        self.rotated = dict(rotated)
        self.absmax = {name: values for name, values in absmax.items() if block.holds(name)}
        self.float_block = copy_of(block.module).float()
        self.int8_block = copy_of(block.module)
        self.folds: dict[int, tuple[Group, Tensor]] = {}
        for name in self.absmax:
            self._quantize(name)

    def block_error(self) -> float:
        """``block_error`` of the quantized copy as it is now."""
        return block_error([call.replay(self.int8_block) for call in self.calls], self.expected)

    def fold_(self, group: Group, s: Tensor) -> None:
        """Makes s [C] the scale of a group, whatever it was before."""
        before = self.folds.get(id(group), (group, torch.ones(group.channels)))[1]
        producer, consumers = group_modules(self.block, group, self.float_block)
        fold_(producer, consumers, group, s / before)
        self.folds[id(group)] = (group, s)
        for name in ([group.producer] if group.producer else []) + list(consumers):
            if name in self.absmax:
                self._quantize(name)
            else:
                self._copy(name)

    def clip_(self, consumers: Sequence[str], limit: float) -> None:
        """Gives an input that the layers ``consumers`` share the static scale of the largest magnitude ``limit``."""
        for name in consumers:
            layer = self.block.find(name, self.int8_block)
            if isinstance(layer, W8A8Linear):
                layer.input_scale = static_scale(torch.tensor(limit), self.scheme.dtype).to(layer.weight.device)

    def smoothed_absmax(self, name: str) -> Tensor:
        """fp32 [K]: the calibrated absmax of a layer's input under the present folds."""
        scale = self.input_scale(name)
        return self.absmax[name] if scale is None else self.absmax[name] / scale.to(self.absmax[name])

    def input_scale(self, name: str) -> Tensor | None:
        """fp32 [K] that a layer's input is divided by under the present folds."""
        for group, s in self.folds.values():
            if name in group.consumers:
                return gather_scale(s, group.consumers[name])
        return None

    def _quantize(self, name: str) -> None:
        local, source = self.block.local_name(name), self.block.find(name, self.float_block)
        if local in self.block.experts:
            experts = quantize_experts(
                source, self.block.experts[local], self.scheme, rotation_of_experts(self.rotated, name)
            )
            replace_(self.int8_block, {local: experts})
            return
        is_explicit = any(name in group.consumers for group, _ in self.folds.values() if group.kind == "explicit")
        smooth = self.input_scale(name) if is_explicit else None
        scheme, rotate = self.schemes.get(name, self.scheme), self.rotated.get(name, 0)
        layer = quantize_linear(as_linear(source), self.smoothed_absmax(name), scheme, smooth=smooth, rotate=rotate)
        replace_(self.int8_block, {local: layer})

    def _copy(self, name: str) -> None:
        source = dict(self.block.find(name, self.float_block).named_parameters(recurse=False))
        for kind, target in self.block.find(name, self.int8_block).named_parameters(recurse=False):
            target.detach().copy_(source[kind].detach())


def search_alphas_(trial: Trial, groups: Sequence[Group], start: float) -> list[Choice]:
    """Finds the best alpha of each group, or none, one group after the other while the others keep theirs.

    Args:
        trial: the block; folded by the choices afterwards.
        groups: its groups.
        start: the alpha that all groups begin with.
    """
    sizes = []
    for group in groups:
        consumers = group_modules(trial.block, group, trial.float_block)[1]
        sizes.append(magnitudes(group, consumers, trial.absmax, trial.scheme))
    for group, size in zip(groups, sizes, strict=True):
        trial.fold_(group, size.scale(start))
    choices = []
    for group, size in zip(groups, sizes, strict=True):
        scales: dict[float | None, Tensor] = {None: torch.ones(group.channels)}
        errors: dict[float | None, float] = {}
        for offsets in ((0.0,), REFINED):
            best = min(errors, key=errors.__getitem__) if errors else None
            centres = GRID if not errors else () if best is None else (best,)
            scales |= {a: size.scale(a) for a in (round(c + o, 2) for c in centres for o in offsets) if 0 <= a <= 1}
            for alpha in [alpha for alpha in scales if alpha not in errors]:
                trial.fold_(group, scales[alpha])
                errors[alpha] = trial.block_error()
        best = min(errors, key=errors.__getitem__)
        trial.fold_(group, scales[best])
        choices.append(Choice(group, best, scales[best]))
    return choices


def _hidden(tensors: Sequence[Tensor]) -> Tensor | None:
    """The hidden states among the tensors that a block returns: the first in floating point, if any."""
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)
