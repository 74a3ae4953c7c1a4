"""Finds the modules that multiply hidden states by a matrix, whose columns can therefore absorb a smoothing scale.

Besides linear layers these are the routers of mixtures, which have a matrix and a forward of another kind, and the
experts that transformers fuses. A router is recognized by trying: with its input divided and its columns multiplied by
powers of two it must return what it did.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .experts import ExpertsLayout, looks_like_experts
from .linears import as_linear, find_linears, is_linear, values_of, weight_nk
from .numerics import same_elements
from .trying import attempt
from .values import tensors_in

# Powers of two commute with rounding, but a kernel may sum in another order, and a softmax or sigmoid may follow.
ROUTER_ROUNDINGS = 8


def find_consumers(block: nn.Module, layouts: Mapping[str, ExpertsLayout]) -> dict[str, nn.Module]:
    """The linear layers, routers and experts below ``block`` by name; ``layouts`` of experts by their names here."""
    consumers: dict[str, nn.Module] = dict(find_linears(block))
    for name, module in block.named_modules():
        is_experts = name in layouts and looks_like_experts(module)
        if name not in consumers and (is_experts or _is_router(module)):
            consumers[name] = module
    return consumers


def columns_of(module: nn.Module, layout: ExpertsLayout | None = None) -> list[Tensor]:
    """The weights [N, K] that multiply the channels of a consumer's input: views, so that changes reach the module."""
    if layout is not None:
        parameters = dict(module.named_parameters(recurse=False))
        parts = [layout.gate, *([] if layout.up is None else [layout.up])]
        return [weight for part in parts for weight in part.weight(parameters)]
    if is_linear(module):
        return [weight_nk(as_linear(module))]
    weight = values_of(module, "weight")
    assert weight is not None
    return [weight]


def _is_router(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if isinstance(module, nn.Embedding) or weight is None or weight.dim() != 2:
        return False
    if any("." in name for name in parameters):
        return False
    # At least fp32: in 16 bits the tolerance would pass for a router what is none.
    values = {name: _wide(value) for name, value in itertools.chain(parameters.items(), module.named_buffers())}
    k = weight.shape[1]
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(values["weight"])
    factor = torch.exp2(torch.arange(k) % 5 - 2.0).to(values["weight"])

    def examine() -> bool:
        before = tensors_in(torch.func.functional_call(module, values, (x,)))
        scaled = values | {"weight": values["weight"] * factor}
        after = tensors_in(torch.func.functional_call(module, scaled, (x / factor,)))
        pairs = list(zip(after, before, strict=True))
        return bool(pairs) and all(same_elements(a, b, ROUTER_ROUNDINGS) for a, b in pairs)

    return attempt(examine, module) is True


def _wide(value: Tensor) -> Tensor:
    value = value.detach()
    return value.to(torch.promote_types(value.dtype, torch.float32)) if value.is_floating_point() else value
