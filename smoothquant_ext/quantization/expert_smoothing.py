"""Smoothing within the experts of a mixture: a scale for each expert between its ``up`` and its ``down``.

``down(act(gate(x)) * up(x))`` stays what it is if the rows of ``up`` are divided by s and the columns of ``down``
multiplied by it: once a module is read as this formula, the pair needs no probing. The fold is proven all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..probing.experts import Reading, sorted_routing
from ..probing.numerics import outlier_ratio
from ..scheme import Scheme
from .report import SmoothedGroup
from .smoothing import Proof, Smoothing, column_absmax, smoothing_scale

# An expert with fewer calibration tokens is left as it is: its largest magnitudes say little of other tokens.
FEWEST_TOKENS = 32


class HiddenRanges:
    """The inputs of ``down`` of every expert, seen while a model runs.

    Attributes:
        absmax: fp32 [E, I] by the name of the module that holds the experts.
        tokens: how many tokens each expert was given, [E].
    """

    def __init__(self) -> None:
        self.absmax: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def watch(self, name: str, module: nn.Module, reading: Reading) -> Any:
        """Adds a hook that looks at every call of the module; returns its handle."""
        parameters = {own: parameter.detach() for own, parameter in module.named_parameters(recurse=False)}
        experts, inner = reading.gate.weight(parameters).shape[:2]
        self.absmax[name], self.tokens[name] = torch.zeros(experts, inner), torch.zeros(experts, dtype=torch.int64)

        def look(_module: nn.Module, args: Any) -> None:
            x = args[0].detach()
            index = sorted_routing(x, experts, skips_zeros=True)[0] if reading.is_sorted else args[1]
            for expert in index.unique().tolist():
                if expert < experts:
                    rows = x[(index == expert).any(dim=-1)]
                    seen = reading.hidden(parameters, rows, expert).abs().amax(dim=0).float().cpu()
                    self.absmax[name][expert] = torch.maximum(self.absmax[name][expert], seen)
                    self.tokens[name][expert] += len(rows)

        return module.register_forward_pre_hook(look)

    def scale(self, name: str, down: Tensor, alpha: float, scheme: Scheme) -> Tensor:
        """s, fp32 [E, I], for the weights ``down`` [E, N, I]; 1 for experts with too few tokens."""
        columns = torch.stack([column_absmax(weight, scheme) for weight in down]).cpu()
        s = smoothing_scale(self.absmax[name], columns, alpha)
        return torch.where(self.tokens[name][:, None] >= FEWEST_TOKENS, s, 1.0)


def smooth_experts_(
    model: nn.Module,
    name: str,
    reading: Reading,
    ranges: HiddenRanges,
    alpha: float,
    scheme: Scheme,
    proof: Proof,
    result: Smoothing,
) -> None:
    """Folds a scale between ``up`` and ``down`` of the experts ``name``, first on the proof's copy of their block."""
    if reading.up is None or name not in ranges.absmax:
        return
    module = model.get_submodule(name)
    s = ranges.scale(name, reading.down.weight(_parameters(module)), alpha, scheme)
    if not bool((s != 1).any()):
        result.failed[f"{name}.up"] = f"no expert was given {FEWEST_TOKENS} calibration tokens"
        return
    trial = proof.block.get_submodule(name.removeprefix(proof.prefix))
    failure = proof.attempt([trial], lambda: _fold_(trial, reading, s)) or _overflow(module, reading, s)
    if failure:
        result.failed[f"{name}.up"] = failure
        return
    _fold_(module, reading, s)
    absmax = ranges.absmax[name]
    chosen = [expert for expert, own in enumerate(s) if bool((own != 1).any())]
    before = max(outlier_ratio(absmax[expert]) for expert in chosen)
    after = max(outlier_ratio(absmax[expert] / s[expert]) for expert in chosen)
    result.groups.append(SmoothedGroup(f"{name}.up", "linear", (f"{name}.down",), alpha, before, after))


def _fold_(module: nn.Module, reading: Reading, s: Tensor) -> None:
    parameters = _parameters(module)
    assert reading.up is not None
    up, down, bias = reading.up.weight(parameters), reading.down.weight(parameters), reading.up.bias_of(parameters)
    for expert, own in enumerate(s):
        wide = own.to(device=up.device, dtype=torch.promote_types(up.dtype, torch.float32))
        up[expert].copy_(up[expert] / wide[:, None])
        down[expert].copy_(down[expert] * wide)
        if bias is not None:
            bias[expert].copy_(bias[expert] / wide)


def _overflow(module: nn.Module, reading: Reading, s: Tensor) -> str:
    """Says which weight the fold would push beyond its dtype's range (it happens in float16), or ''."""
    parameters = _parameters(module)
    assert reading.up is not None
    rows = {
        f"{reading.up.name} (up)": (reading.up.weight(parameters).abs().amax(dim=2), 1 / s),
        reading.down.name: (reading.down.weight(parameters).abs().amax(dim=1), s),
    }
    for name, (magnitude, factor) in rows.items():
        if float((magnitude.cpu().double() * factor.double()).max()) > torch.finfo(magnitude.dtype).max:
            return f"folding it overflows {name} in {str(magnitude.dtype).removeprefix('torch.')}"
    return ""


def _parameters(module: nn.Module) -> Mapping[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
