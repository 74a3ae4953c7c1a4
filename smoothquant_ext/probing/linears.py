"""The linear layers of a model: which modules count as linear, and their weights as [N, K]."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import ExpertsLayout, agrees, looks_like_experts, match_layouts
from .numerics import same_elements
from .trying import attempt

if TYPE_CHECKING:
    Linear: TypeAlias = nn.Linear  # what is used of a Conv1D, it has too
else:
    Linear = nn.Linear | Conv1D

# Between a subclass and ``nn.Linear``: a product, an addition, and sums in another order, as its kernel may take them.
LINEAR_ROUNDINGS = 4


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear``, GPT-2's ``Conv1D``, and subclasses that compute just what ``nn.Linear`` computes.

    Hooks that follow it, and a forward pass that was put in an instance, count as those of a subclass.
    """
    if type(module) in (nn.Linear, Conv1D) and not _is_altered(module):
        return True
    return isinstance(module, nn.Linear | Conv1D) and _computes_linear(as_linear(module))


def _is_altered(module: nn.Module) -> bool:
    """Whether something else than the class has a say in the output; accelerate only moves tensors."""
    own = vars(module)
    return bool(own["_forward_hooks"]) or ("forward" in own and "_hf_hook" not in own)


def _computes_linear(module: Linear) -> bool:
    def examine() -> bool:
        weight = weight_nk(module)
        x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype)
        rows = x.reshape(2, -1)
        y, expected = module(rows), nn.functional.linear(rows, weight, module.bias)
        # A router returns its choice, no tensor. Damaged weights are reported elsewhere.
        return isinstance(y, Tensor) and same_elements(y, expected, LINEAR_ROUNDINGS, equal_nan=True)

    return attempt(examine, module) is True


def find_linears(module: nn.Module) -> dict[str, Linear]:
    """All linear layers below ``module`` by name, in the order of registration, shared ones once."""
    return {name: as_linear(child) for name, child in module.named_modules() if is_linear(child)}


def find_experts(model: nn.Module) -> dict[str, ExpertsLayout | None]:
    """The layouts of the modules that hold the experts of a mixture, by name; ``None`` where no layout matches."""
    modules = {name: module for name, module in model.named_modules() if looks_like_experts(module)}
    return {
        name: layout if layout is not None and agrees(modules[name], layout) else None
        for name, layout in match_layouts(modules).items()
    }


def as_linear(module: nn.Module) -> Linear:
    """The same module, for the type checker."""
    return cast(Linear, module)


def values_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter's values without its graph, sharing its memory; ``None`` where the module has none of that name."""
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, Tensor) else None


def output_width(module: nn.Module) -> int:
    """Channels of the output of a linear layer or of a norm with a weight."""
    weight = weight_nk(as_linear(module)) if is_linear(module) else values_of(module, "weight")
    assert weight is not None
    return weight.shape[0]


def weight_nk(linear: Linear) -> Tensor:
    """The weight as [N out, K in]; a view, so that in-place changes reach the layer (``Conv1D`` stores [K, N])."""
    weight: Tensor = linear.weight.detach()
    return weight.t() if isinstance(linear, Conv1D) else weight
