"""Watching and replacing modules of a model for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def output_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x, or ``None`` if it is not a function of one tensor."""
    try:
        with torch.no_grad():
            output = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return output if isinstance(output, Tensor) else None


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules in the places of some."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
