"""Values that modules are called with and return: tensors in tuples, dictionaries, dataclasses, caches and so on."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Leaf = TypeVar("Leaf")

# These are shared, not copied: a module stays the one it is, and the others do not change, or cannot be copied.
SHARED = (
    *(nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType),
    *(str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size),
)


def map_values(function: Callable[[Any], Any], value: Any, kinds: type | tuple[type, ...] = Tensor) -> Any:
    """A copy of a value, with ``function`` of every tensor in it, so that nobody who changes the copy changes it.

    What was one object is one in the copy, tensors too: a module may ask whether two of its arguments are the same.

    Args:
        function: of a tensor, called once for each.
        value: of any type; containers and objects, such as a cache, are copied, modules are not.
        kinds: what counts as a tensor.
    """
    return _Copier(function, kinds)(value)


class _Copier:
    def __init__(self, function: Callable[[Any], Any], kinds: type | tuple[type, ...]) -> None:
        self.function, self.kinds = function, kinds
        self.memo: dict[int, Any] = {}
        self.alive: list[Any] = []  # so that no other object gets an id of the memo

    def __call__(self, value: Any) -> Any:
        if id(value) in self.memo:
            return self.memo[id(value)]
        self.alive.append(value)
        if isinstance(value, self.kinds):
            return self._note(value, self.function(value))
        if isinstance(value, (*SHARED, Tensor)):
            return value
        if type(value) is tuple:
            return self._note(value, tuple(map(self, value)))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._note(value, type(value)(*map(self, value)))
        if type(value) is list:
            result = self._note(value, [])
            result.extend(map(self, value))
            return result
        if type(value) is dict:
            result = self._note(value, {})
            result.update({key: self(each) for key, each in value.items()})
            return result
        return self._object(value)

    def _note(self, value: Any, result: Any) -> Any:
        self.memo[id(value)] = result
        return result

    def _object(self, value: Any) -> Any:
        """A copy of an object of any other class: of its attributes, and of its items if it is a dictionary."""
        try:
            result = copy.copy(value)
            if result is value:  # a member of an enumeration
                return value
            self._note(value, result)
            if isinstance(value, list):
                result[:] = map(self, value)
            elif isinstance(value, dict):
                for key, each in value.items():
                    result[key] = self(each)
            for name, each in getattr(value, "__dict__", {}).items():
                result.__dict__[name] = self(each)
        except Exception:  # a generator, a lock: there is only the one
            return self._note(value, value)
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a value, in order: in nested containers and dataclasses; and, if there are none, in any object."""
    found = [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]
    if not found:
        found = [leaf for each in _leaves(value) for leaf in tree_leaves(getattr(each, "__dict__", {}))]
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _leaves([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
        elif isinstance(leaf, Mapping):
            yield from _leaves(list(leaf.values()))
        else:
            yield leaf


def leaves_of(value: Any, kind: type[Leaf]) -> list[Leaf]:
    """Everything of one class in a value, wherever ``map_values`` finds it."""
    found: list[Leaf] = []
    map_values(found.append, value, kind)
    return found


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module of one argument was called with, by position or by name; ``None`` if it was called with nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any) -> tuple[Any, Any]:
    """The same arguments with another first one."""
    if args:
        return (value, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: value}


def version_of(tensor: Tensor) -> int:
    """Counts changes in place, where torch does; -1 for tensors of inference mode, of which it does not."""
    return -1 if tensor.is_inference() else tensor._version
