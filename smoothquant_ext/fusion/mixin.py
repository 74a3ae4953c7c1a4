"""Classes of fused modules: each is a subclass, made at run time, of the class that it replaces."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is the mixin's."""
    members: dict[str, Any] = {"__module__": __name__, "__reduce_ex__": _reduce}
    return type(f"Fused{base.__name__}", (mixin, base), members)


def _reduce(module: nn.Module, _protocol: int) -> tuple[Any, ...]:
    """Pickles and copies a module whose class is made at run time: the class is made again."""
    mixin, base = type(module).__bases__
    return _empty, (mixin, base), vars(module)


def _empty(mixin: type, base: Any) -> nn.Module:
    made: Any = fused_class(mixin, base)
    empty: nn.Module = made.__new__(made)
    return empty
