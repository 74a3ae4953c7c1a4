"""Classes of fused modules: each is a subclass, made at run time, of the class that it replaces."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn


@functools.cache
def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is the mixin's."""
    members: dict[str, Any] = {"__module__": __name__, "__reduce_ex__": _reduce}
    return type(f"Fused{base.__name__}", (mixin, base), members)


def fuse_as_(module: nn.Module, mixin: type, attributes: Mapping[str, Any]) -> None:
    """Makes a module an instance of its fused class, with the mixin's attributes."""
    module.__class__ = fused_class(mixin, type(module))  # type: ignore[arg-type]
    vars(module).update(attributes)
    _tell_accelerate(module)


def unfuse_(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Undoes the last ``fuse_as_``."""
    module.__class__ = type(module).__bases__[1]
    for name in attributes:
        del vars(module)[name]
    _tell_accelerate(module)


def _tell_accelerate(module: nn.Module) -> None:
    """Its hooks call the forward pass that a module had when they came, and so would miss the new one."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)


def _reduce(module: nn.Module, _protocol: int) -> tuple[Any, ...]:
    """Pickles and copies a module whose class is made at run time: the class is made again."""
    mixin, base = type(module).__bases__
    return _empty, (mixin, base), vars(module)


def _empty(mixin: type, base: Any) -> nn.Module:
    made: Any = fused_class(mixin, base)
    empty: nn.Module = made.__new__(made)
    return empty
