"""Copies of modules to try things on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copy_of(module: Module, memo: Mapping[int, Any] | None = None) -> Module:
    """A copy of a module that shares no tensor with it.

    ``copy.deepcopy`` refuses a module that keeps a result of its forward pass with its graph, or anything that cannot
    be copied, such as a lock. The copy has the result without a graph, and the very same lock.

    Args:
        module: any module.
        memo: copies that are made already, by the id of the original.
    """
    memo = dict(memo or {}) | _without_graphs(module)
    try:
        return copy.deepcopy(module, dict(memo))
    except Exception:
        return copy.deepcopy(module, memo | _uncopyable(module, memo))


def raised_(module: Module, dtype: torch.dtype) -> Module:
    """Converts parameters and buffers in floating point to a dtype, in place; complex ones stay complex."""
    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return module


def _without_graphs(module: nn.Module) -> dict[int, Tensor]:
    values = [value for owner in module.modules() for value in tree_leaves(vars(owner))]
    results = [value for value in values if isinstance(value, Tensor) and value.grad_fn is not None]
    return {id(result): result.detach().clone() for result in results}


def _uncopyable(module: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    shared = {}
    for owner in module.modules():
        for value in tree_leaves(vars(owner)):
            if isinstance(value, nn.Module | Tensor):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                shared[id(value)] = value
    return shared
