"""MLPs as one op: ``down(act(gate(x)) * up(x))``, gate and up two layers or one, and ``down(act(gate(x)))``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import ACTIVATIONS
from ..nn.grad import needs_grad
from ..nn.linear import W8A8Linear, have_one_input_scale
from ..nn.placement import has_ops
from ..packing import PANEL
from ..probing.hooks import hooked, is_watched, output_of
from ..probing.numerics import same_elements
from ..probing.values import first_argument

# Of the last layer's input, in the dtype of the activations: the activation, a cast, a product and another cast.
ROUNDINGS = 4


class Roles(NamedTuple):
    """The names of an MLP's layers, and what happens between them.

    ``up`` is ``None`` in a plain MLP. It equals ``gate`` where one layer computes both, one after the other.
    """

    gate: str
    up: str | None
    down: str
    activation: str
    up_first: bool = False

    @property
    def is_packed(self) -> bool:
        """Whether one layer computes gate and up."""
        return self.up == self.gate


class FusedMLP:
    """Mixed into the class of an MLP: one op where our ops run, the class's own forward elsewhere."""

    fused_roles: Roles
    fused_halves: tuple[Tensor, ops.Layer, ops.Layer] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[..., K] -> [..., N]; what it is called with besides is for its own class."""
        if len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        hidden_states: Tensor = args[0]
        roles, modules = self.fused_roles, self._modules  # type: ignore[attr-defined]
        gate, down = modules[roles.gate], modules[roles.down]
        up = None if roles.up is None else modules[roles.up]
        is_ours = all(_is_plain(layer, hidden_states) for layer in (gate, up, down) if layer is not None)
        if not is_ours or not has_ops(hidden_states) or needs_grad(hidden_states):
            return super().forward(hidden_states)  # type: ignore[misc]
        if roles.is_packed:
            layers = [*self._halves(gate), down.tensors]
        else:
            layers = [layer.tensors for layer in (gate, up, down) if layer is not None]
        input_scale = [gate.input_scale, down.input_scale]
        return ops.w8a8_mlp(
            hidden_states, *ops.as_lists(layers), input_scale, roles.activation, [gate.rotate, down.rotate]
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.fused_halves = None  # they would keep a weight where it was
        return super()._apply(fn, recurse)  # type: ignore[misc, no-any-return]

    def _halves(self, layer: W8A8Linear) -> tuple[ops.Layer, ops.Layer]:
        """Gate and up of a layer that computes both: views, kept until the layer has another weight."""
        if self.fused_halves is None or self.fused_halves[0] is not layer.weight:
            first, second = _split(layer)
            gate, up = (second, first) if self.fused_roles.up_first else (first, second)
            self.fused_halves = (layer.weight, gate, up)
        return self.fused_halves[1:]


def mlp_attributes(module: nn.Module) -> dict[str, Any] | None:
    """The attributes of a ``FusedMLP``; ``None`` unless the module is an MLP of 8-bit layers that it can compute."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, W8A8Linear)}
    others = [child for child in module.modules() if not isinstance(child, W8A8Linear)]
    if isinstance(module, FusedMLP) or len(linears) not in (2, 3) or any(_has_parameters(child) for child in others):
        return None
    if not all(has_ops(linear.weight) for linear in module.modules() if isinstance(linear, W8A8Linear)):
        return None
    if not all(linear.is_plain for linear in linears.values()):
        return None
    for width in {linear.in_features for linear in linears.values()}:  # of the input, or of what is inside
        roles = _find_roles(module, linears, width)
        if roles is not None:
            return {"fused_roles": roles, "fused_halves": None}
    return None


def _find_roles(module: nn.Module, linears: dict[str, W8A8Linear], width: int) -> Roles | None:
    """Which layer is what, seen from their inputs and outputs in one run on noise [3, width]."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def capture(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        inputs[name], outputs[name] = first_argument(args, kwargs), output

    noise = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 2
    with hooked(linears, after=capture):
        result = output_of(module, noise.to(next(iter(linears.values())).weight.device, _float_dtype(module)))
    if result is None or set(outputs) != set(linears):
        return None
    *first, down = outputs  # in the order in which they ran
    if inputs[first[0]] is not inputs[first[-1]] or not torch.equal(outputs[down], result):
        return None
    if not have_one_input_scale([linears[name] for name in first]):
        return None
    if len({linears[name].weight.dtype for name in first}) > 1:
        return None
    matches = {
        roles: _share_of_equal(inputs[down], values)
        for roles, values in _candidates(first, down, outputs, linears)
        if same_elements(inputs[down], values, ROUNDINGS)
    }
    return max(matches, key=matches.__getitem__) if matches else None


def _candidates(
    first: list[str], down: str, outputs: dict[str, Tensor], linears: dict[str, W8A8Linear]
) -> Iterator[tuple[Roles, Tensor]]:
    """Every structure that these layers could be in, with the input that the last one would then have, in fp32."""
    values = [outputs[name].float() for name in first]
    for name, activation in ACTIVATIONS.items():
        if len(first) == 1:
            yield Roles(first[0], None, down, name), activation(values[0])
            inner = linears[down].in_features
            if values[0].shape[-1] == 2 * inner and inner % PANEL == 0:
                halves = values[0].split(inner, dim=-1)
                yield Roles(first[0], first[0], down, name), activation(halves[0]) * halves[1]
                yield Roles(first[0], first[0], down, name, up_first=True), activation(halves[1]) * halves[0]
        elif values[0].shape == values[1].shape:
            yield Roles(first[0], first[1], down, name), activation(values[0]) * values[1]
            yield Roles(first[1], first[0], down, name), activation(values[1]) * values[0]


def _share_of_equal(actual: Tensor, expected: Tensor) -> float:
    """Where two activations agree within rounding, as GELU and its approximation do in bf16, more values are equal."""
    return float((actual == expected.to(actual.dtype)).float().mean())


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """An adapter in the place of a layer, or a hook on it, expects to be called; it may move x to the layer."""
    return type(module) is W8A8Linear and module.is_with(x) and not is_watched(module)


def _split(layer: W8A8Linear) -> tuple[ops.Layer, ops.Layer]:
    """The two halves of the outputs of a layer."""
    weight, scale, bias = layer.tensors
    inner = layer.out_features // 2
    middle = inner // PANEL if layer.is_packed else inner
    scale = scale.reshape(-1).expand(layer.out_features).contiguous()
    first = ops.Layer(weight[:middle], scale[:inner], None if bias is None else bias[:inner])
    return first, ops.Layer(weight[middle:], scale[inner:], None if bias is None else bias[inner:])


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _float_dtype(module: nn.Module) -> torch.dtype:
    biases = [
        child.bias.dtype for child in module.modules() if isinstance(child, W8A8Linear) and child.bias is not None
    ]
    return biases[0] if biases else torch.float32
