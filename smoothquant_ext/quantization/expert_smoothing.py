"""Smoothing within the experts of a mixture: a scale for each expert between its ``up`` and its ``down``.

``down(act(gate(x)) * up(x))`` stays what it is if the rows of ``up`` are divided by s and the columns of ``down``
multiplied by it. A module that was matched with this formula needs no probing for the pair. The fold is proven all the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..probing.experts import ExpertsLayout, sorted_routing
from ..probing.hooks import hooked
from ..probing.numerics import outlier_ratio
from ..scheme import Scheme
from .report import SmoothedGroup
from .smoothing import Proof, column_absmax, overflow, smoothing_scale

# An expert with fewer calibration tokens is left as it is: its largest magnitudes say little of other tokens.
FEWEST_TOKENS = 32


class HiddenRanges:
    """Ranges of the input of every expert's ``down``, measured while a model runs.

    Attributes:
        absmax: fp32 [E, I] by the name of the module that holds the experts.
        tokens: how many tokens each expert was given, [E].
    """

    def __init__(self, modules: Mapping[str, nn.Module], layouts: Mapping[str, ExpertsLayout]) -> None:
        """Takes the modules and the layouts by name; only experts with an ``up`` are measured."""
        self._layouts = {name: layout for name, layout in layouts.items() if layout.up is not None}
        self._modules = {name: modules[name] for name in self._layouts}
        self.absmax: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        for name, layout in self._layouts.items():
            experts, inner = layout.gate.weight(_parameters(self._modules[name])).shape[:2]
            self.absmax[name], self.tokens[name] = torch.zeros(experts, inner), torch.zeros(experts, dtype=torch.int64)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures every call of the modules until the ``with`` body ends."""
        with hooked(self._modules, before=self._measure):
            yield

    def _measure(self, name: str, args: Any, kwargs: Any) -> None:
        args = (*args, *kwargs.values())
        layout, parameters, experts = self._layouts[name], _parameters(self._modules[name]), len(self.tokens[name])
        x = args[0].detach()
        parameters = {kind: values.to(x.device) for kind, values in parameters.items()}  # a copy may run, elsewhere
        index = sorted_routing(x, experts, skips_zeros=True)[0] if layout.is_sorted else args[1]
        for expert in index.unique().tolist():
            if expert < experts:
                rows = x[(index == expert).any(dim=-1)]
                largest = layout.hidden(parameters, rows, expert).abs().amax(dim=0).float().cpu()
                self.absmax[name][expert] = torch.maximum(self.absmax[name][expert], largest)
                self.tokens[name][expert] += len(rows)

    def scale(self, name: str, down: Tensor, alpha: float, scheme: Scheme) -> Tensor:
        """s, fp32 [E, I], for the weights ``down`` [E, N, I]; 1 for experts with too few tokens."""
        columns = torch.stack([column_absmax(weight, scheme) for weight in down]).cpu()
        s = smoothing_scale(self.absmax[name], columns, alpha)
        return torch.where(self.tokens[name][:, None] >= FEWEST_TOKENS, s, 1.0)


def smooth_experts_(
    proof: Proof, name: str, ranges: HiddenRanges, alpha: float, scheme: Scheme
) -> SmoothedGroup | str | None:
    """Folds a scale between ``up`` and ``down`` of the experts ``name``, first on the proof's copy of their block.

    Returns:
        The smoothed group, or the reason why the experts were left as they were, or ``None`` where the ranges have
        nothing of them.
    """
    if name not in ranges.absmax:
        return None
    module, layout = proof.block.find(name), proof.block.experts[proof.block.local_name(name)]
    s = ranges.scale(name, layout.down.weight(_parameters(module)), alpha, scheme)
    if not bool((s != 1).any()):
        return f"no expert was given {FEWEST_TOKENS} calibration tokens"
    trial = proof.block.find(name, proof.module)
    failure = proof.attempt([trial], lambda: _fold_(trial, layout, s)) or _overflow(module, layout, s)
    if failure:
        return failure
    _fold_(module, layout, s)
    absmax = ranges.absmax[name]
    chosen = [expert for expert, scale in enumerate(s) if bool((scale != 1).any())]
    before = max(outlier_ratio(absmax[expert]) for expert in chosen)
    after = max(outlier_ratio(absmax[expert] / s[expert]) for expert in chosen)
    return SmoothedGroup(f"{name}.up", "linear", (f"{name}.down",), alpha, before, after)


def _fold_(module: nn.Module, layout: ExpertsLayout, s: Tensor) -> None:
    parameters = _parameters(module)
    assert layout.up is not None
    up, down, bias = layout.up.weight(parameters), layout.down.weight(parameters), layout.up.bias_of(parameters)
    for expert, scale in enumerate(s):
        wide = scale.to(device=up.device, dtype=torch.promote_types(up.dtype, torch.float32))
        up[expert].copy_(up[expert] / wide[:, None])
        down[expert].copy_(down[expert] * wide)
        if bias is not None:
            bias[expert].copy_(bias[expert] / wide)


def _overflow(module: nn.Module, layout: ExpertsLayout, s: Tensor) -> str:
    parameters = _parameters(module)
    assert layout.up is not None
    return overflow(
        {
            f"{layout.up.name} (up)": (layout.up.weight(parameters).abs().amax(dim=2), 1 / s),
            layout.down.name: (layout.down.weight(parameters).abs().amax(dim=1), s),
        }
    )


def _parameters(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
