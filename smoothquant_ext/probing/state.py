"""Everything that makes up a module, by references, which cost nothing to keep."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

CONTAINERS = (dict, collections.OrderedDict, collections.defaultdict, list, set, collections.deque)
# Neither do these belong to the module that refers to them, nor do they change.
FOREIGN = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class State:
    """Classes, parameters, attributes and hooks of a module and of all below, and what the attributes hold.

    Values within tensors are not kept.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.classes = [(each, type(each)) for each in modules]
        # A module that moves to another device keeps its parameters, which get other data: the old stay where they are.
        self.parameters = [(each, each.data, each.requires_grad, each.grad) for each in module.parameters()]
        self.contents: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        pending: list[Any] = [vars(each) for each in modules]
        while pending:
            container = pending.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            self.contents.append((container, copy.copy(container)))
            values = container.values() if isinstance(container, dict) else container
            pending += [inner for value in values if (inner := _inner(value)) is not None]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that the module and its attributes hold."""
        for _, content in self.contents:
            for value in content.values() if isinstance(content, dict) else content:
                if isinstance(value, Tensor):
                    yield value

    def restore_(self) -> None:
        """Makes the module what it was."""
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for parameter, data, requires_grad, grad in self.parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for container, content in self.contents:
            _refill_(container, content)


def _inner(value: Any) -> Any:
    """A container itself, or the attributes of an object; ``None`` for anything else."""
    if type(value) in CONTAINERS:
        return value
    if isinstance(value, FOREIGN):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def _refill_(container: Any, content: Any) -> None:
    """Gives a container its content of before; it stays the same object, which hooks' handles refer to."""
    container.clear()
    if isinstance(container, list | collections.deque):
        container.extend(content)
    else:
        container.update(content)
