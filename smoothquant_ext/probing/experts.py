"""Finds which part of a module's parameters is which layer of a mixture of experts, by trying, not by class name.

transformers keeps the experts of a mixture in tensors of three dimensions, ``[E, N, K]`` or transposed, gate and up in
one or apart, one after the other or interleaved. Each possible layout is a formula. The module is run with random
parameters, and the formula that reproduces its output is the right one. A module that computes anything else, such as
a clamped activation, matches none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from .numerics import same_rows
from .trying import attempt

TOKENS, SLOTS = 5, 2  # of the trial
SIZES = (1.0, 2.0, 8.0, 64.0, 512.0)  # of the tokens' values: a limit that cuts off large ones has to show
# Of a token's output in fp32: sums of many terms in another order, a few roundings each.
FLOAT_ROUNDINGS = 64
# With a module's real weights and dtype: four intermediate results are rounded, and each output is a sum of many. No
# other layout comes that near.
MODULE_ROUNDINGS = 16


@dataclass(frozen=True)
class ExpertPart:
    """Where one layer of every expert lies in a module's parameters.

    Attributes:
        name: of the parameter that holds the weights.
        rows: which of its output features.
        is_transposed: whether it is [E, K, N] and not [E, N, K].
        bias: of the parameter [E, N] with the biases, or ``None``.
    """

    name: str
    rows: slice
    is_transposed: bool
    bias: str | None

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The weights [E, N, K]: a view, so that in-place changes reach the module."""
        weight = parameters[self.name].detach()
        return (weight.transpose(1, 2) if self.is_transposed else weight)[:, self.rows]

    def bias_of(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """The biases [E, N], a view, or ``None``."""
        return None if self.bias is None else parameters[self.bias].detach()[:, self.rows]


@dataclass(frozen=True)
class ExpertsLayout:
    """The layers of a module's experts: each computes ``down(act(gate(x)) * up(x))``, or without ``up``.

    Attributes:
        activation: the name of ``act``.
        is_sorted: whether the module is called with the tokens of one expert after the other, as many for each,
            [E * T, K], and nothing else; otherwise with tokens, the experts of each, and the weights of these.
    """

    gate: ExpertPart
    up: ExpertPart | None
    down: ExpertPart
    activation: str
    is_sorted: bool = False

    @property
    def parts(self) -> dict[str, ExpertPart]:
        """The layers by name."""
        return {"gate": self.gate, "down": self.down} | ({"up": self.up} if self.up is not None else {})

    def output(self, parameters: Mapping[str, Tensor], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The output of the experts in floating point: [T, N] of x [T, K], index and weights [T, slots]."""
        y = x.new_zeros(x.shape[0], self.down.weight(parameters).shape[1])
        for token, slot in itertools.product(range(index.shape[0]), range(index.shape[1])):
            expert = int(index[token, slot])
            hidden = self.hidden(parameters, x[token], expert)
            y[token] += weights[token, slot] * _layer(self.down, parameters, expert, hidden)
        return y

    def hidden(self, parameters: Mapping[str, Tensor], x: Tensor, expert: int) -> Tensor:
        """The input of an expert's ``down``: [..., I] of x [..., K]."""
        values = ACTIVATIONS[self.activation](_layer(self.gate, parameters, expert, x))
        return values if self.up is None else values * _layer(self.up, parameters, expert, x)


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module's only parameters are two or three weights [E, ., .] and biases [E, .] of as many experts."""
    parameters = list(module.parameters(recurse=False))
    if len(parameters) != sum(1 for _ in module.parameters()) or any(p.dim() not in (2, 3) for p in parameters):
        return False
    weights = [parameter for parameter in parameters if parameter.dim() == 3]
    return len(weights) in (2, 3) and len({parameter.shape[0] for parameter in parameters}) == 1


def match_experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a module that ``looks_like_experts``; ``None`` if no formula reproduces its output.

    The module is called as transformers does, ``module(hidden_states [T, K], top_k_index [T, slots], top_k_weights)``
    or ``module(hidden_states [E * T, K])``, with random parameters in fp32, so that a module on the meta device can be
    matched too. In the first case all experts share their parameters, in the second there are only two experts.
    """
    with torch.device("cpu"):  # transformers builds models in a context of another one
        return _match_routed(module) or _match_sorted(module)


def match_layouts(modules: Mapping[str, nn.Module]) -> dict[str, ExpertsLayout | None]:
    """``match_experts_layout`` of each module, tried once for all modules of one class with the same shapes."""
    of_kind: dict[object, ExpertsLayout | None] = {}
    layouts: dict[str, ExpertsLayout | None] = {}
    for name, module in modules.items():
        shapes = tuple((key, tuple(parameter.shape)) for key, parameter in module.named_parameters())
        kind = type(module), shapes
        if kind not in of_kind:
            of_kind[kind] = match_experts_layout(module)
        layouts[name] = of_kind[kind]
    return layouts


def sorted_routing(x: Tensor, experts: int, skips_zeros: bool = False) -> tuple[Tensor, Tensor]:
    """The expert and the weight of each of the tokens [E * T, K] that come one expert after the other: [E * T, 1].

    With ``skips_zeros`` a token of zeros goes to none: experts without biases return zeros for it.
    """
    index = torch.arange(experts, device=x.device).repeat_interleave(len(x) // experts)
    if skips_zeros:
        index = torch.where((x != 0).any(dim=-1), index, experts)
    return index[:, None], x.new_ones(len(x), 1)


def _match_sorted(module: nn.Module) -> ExpertsLayout | None:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(2, *shape[1:], generator=generator, dtype=torch.float32) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    outputs: dict[int, Tensor | None] = {}
    for layout in _possible_layouts(shapes):
        width = layout.gate.weight(parameters).shape[2]
        x = torch.randn(2, len(SIZES), width, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        x = (x * torch.tensor(SIZES, dtype=torch.float32)[:, None]).flatten(0, 1)
        if width not in outputs:
            outputs[width] = _output_of(module, parameters, x)
        actual = outputs[width]
        if actual is not None and same_rows(
            actual, layout.output(parameters, x, *sorted_routing(x, 2)), FLOAT_ROUNDINGS
        ):
            return replace(layout, is_sorted=True)
    return None


def _match_routed(module: nn.Module) -> ExpertsLayout | None:
    shapes = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        one = torch.randn(1, *shape[1:], generator=generator, dtype=torch.float32)
        parameters[name] = (one * shape[-1] ** -0.5).expand(shape)
    experts = next(iter(shapes.values()))[0]
    index = torch.stack([torch.randperm(experts, generator=generator)[:SLOTS] for _ in range(TOKENS)])
    weights = torch.rand(index.shape, generator=generator, dtype=torch.float32)
    outputs: dict[int, Tensor | None] = {}
    for layout in _possible_layouts(shapes):
        width = layout.gate.weight(parameters).shape[2]
        x = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        x *= torch.tensor(SIZES, dtype=torch.float32)[:, None]
        if width not in outputs:
            outputs[width] = _output_of(module, parameters, x, index, weights)
        actual = outputs[width]
        if actual is not None and same_rows(actual, layout.output(parameters, x, index, weights), FLOAT_ROUNDINGS):
            return layout
    return None


def agrees(module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether a module's output with its real weights is that of the layout, up to the roundings of its dtype."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    weight = layout.gate.weight(parameters)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * TOKENS, weight.shape[2], generator=generator).to(weight)
    arguments: tuple[Tensor, ...]
    if layout.is_sorted:
        parameters = {name: parameter[:2] for name, parameter in parameters.items()}
        arguments, routing = (x,), sorted_routing(x, min(2, len(weight)))
    else:
        index = torch.stack([torch.randperm(len(weight), generator=generator)[:SLOTS] for _ in x])
        routing = index.to(weight.device), torch.rand(index.shape, generator=generator).to(weight)
        arguments = x, *routing
    actual = _output_of(module, parameters, *arguments)
    expected = layout.output(parameters, x.float(), routing[0], routing[1].float())
    return actual is not None and same_rows(actual, expected, MODULE_ROUNDINGS)


@contextmanager
def plain_forward(module: nn.Module) -> Iterator[None]:
    """Makes transformers run experts one by one until the ``with`` body ends, whatever kernel was chosen for them."""
    config: Any = getattr(module, "config", None)
    before = getattr(config, "_experts_implementation_internal", None)
    if before is None:
        yield
        return
    config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        config._experts_implementation_internal = before


def _layer(part: ExpertPart, parameters: Mapping[str, Tensor], expert: int, x: Tensor) -> Tensor:
    weight, bias = part.weight(parameters)[expert], part.bias_of(parameters)
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias[expert].to(x.dtype))


def _output_of(module: nn.Module, parameters: Mapping[str, Tensor], *arguments: Tensor) -> Tensor | None:
    def run() -> Any:
        with plain_forward(module):
            return torch.func.functional_call(module, dict(parameters), arguments)

    output = attempt(run, module)
    return output if isinstance(output, Tensor) else None


def _possible_layouts(parameters: Mapping[str, torch.Size]) -> Iterator[ExpertsLayout]:
    """Every layout that fits the shapes of these parameters, with each activation."""
    weights = {name: shape for name, shape in parameters.items() if len(shape) == 3}
    biases = [name for name, shape in parameters.items() if len(shape) == 2]
    for names in itertools.permutations(weights):
        for is_transposed in (False, True):
            shapes = [weights[name][1:][:: -1 if is_transposed else 1] for name in names]  # (N, K)
            *first, (_, inner) = shapes
            if any(k != first[0][1] for _, k in first):
                continue
            for chosen in itertools.permutations([*biases, *[None] * len(names)], len(names)):
                if len({name for name in chosen if name}) != len(biases):
                    continue
                if any(bias and parameters[bias][1] != shape[0] for bias, shape in zip(chosen, shapes, strict=True)):
                    continue
                layers = [(name, bias) for name, bias in zip(names, chosen, strict=True)]
                for gate, up in _first_layers(layers[:-1], [shape[0] for shape in first], inner, is_transposed):
                    down = ExpertPart(layers[-1][0], slice(None), is_transposed, layers[-1][1])
                    yield from (ExpertsLayout(gate, up, down, activation) for activation in ACTIVATIONS)


def _first_layers(
    layers: list[tuple[str, str | None]], widths: list[int], inner: int, is_transposed: bool
) -> Iterator[tuple[ExpertPart, ExpertPart | None]]:
    """Gate and up of one parameter or two, of these widths."""
    parts = [ExpertPart(name, slice(None), is_transposed, bias) for name, bias in layers]
    if len(layers) == 2 and widths == [inner, inner]:
        yield parts[0], parts[1]
    elif len(layers) == 1 and widths == [inner]:
        yield parts[0], None
    elif len(layers) == 1 and widths == [2 * inner]:
        name, bias = layers[0]
        for pair in ((slice(0, inner), slice(inner, 2 * inner)), (slice(0, None, 2), slice(1, None, 2))):
            first, second = (ExpertPart(name, rows, is_transposed, bias) for rows in pair)
            yield first, second
            yield second, first
