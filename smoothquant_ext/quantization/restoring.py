"""Puts a model back together as it was if its quantization fails.

What quantization does to a model is to exchange parameters, buffers, modules and classes; it writes into no tensor. So
the model as it was is a matter of references, which cost nothing to keep.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Undoes what the ``with`` body did to a model if it raises, be it an error or an interrupt.

    Modules, classes, parameters, buffers, hooks, devices and configurations are as before then. Values that were
    written into a tensor are not.
    """
    before = _State(model)
    try:
        yield
    except BaseException:
        before.restore_()
        raise


class _State:
    """References to everything that makes up a model."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.classes = [(module, type(module)) for module in modules]
        # A module that moves to another device keeps its parameters, which get other data: the old stay where they are.
        self.parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
        configs = {id(config): config for module in modules if hasattr(config := _config(module), "__dict__")}
        self.attributes = [(vars(owner), _shallow(vars(owner))) for owner in (*modules, *configs.values())]

    def restore_(self) -> None:
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for parameter, data, requires_grad in self.parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for attributes, before in self.attributes:
            _refill_(attributes, {name: value for name, (value, _) in before.items()})
            for value, content in before.values():
                if content is not None:
                    _refill_(value, content)


def _config(module: nn.Module) -> Any:
    return vars(module).get("config")


def _shallow(attributes: MutableMapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and a copy of it if it is a dictionary or a set, such as the one of a module's buffers."""
    return {
        name: (value, copy.copy(value) if isinstance(value, dict | set) else None) for name, value in attributes.items()
    }


def _refill_(container: Any, content: Any) -> None:
    """Gives a dictionary or a set its content of before; it stays the same object, which hooks' handles refer to."""
    container.clear()
    container.update(content)
