"""What finding and making fused modules takes: subclasses, outputs on random input, comparison with a formula."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

# Roundings between the two computations: in the dtype of the activations, a cast, a product and another cast.
ROUNDINGS = 4


@functools.cache
def fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is the mixin's."""
    members: dict[str, Any] = {"__module__": __name__, "__reduce_ex__": _reduce}
    return type(f"Fused{base.__name__}", (mixin, base), members)


def _reduce(module: nn.Module, _protocol: int) -> tuple[Any, ...]:
    """How a module whose class is made at run time is pickled and copied: the class is made again."""
    mixin, base = type(module).__bases__
    return _empty, (mixin, base), vars(module)


def _empty(mixin: type, base: Any) -> nn.Module:
    made: Any = fused_class(mixin, base)
    empty: nn.Module = made.__new__(made)
    return empty


def output_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x, or ``None`` if it is not a function of one tensor."""
    try:
        with torch.no_grad():
            output = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return output if isinstance(output, Tensor) else None


def agrees(actual: Tensor | None, expected: Tensor) -> bool:
    """Equal within a few roundings of the narrower dtype, element by element."""
    if actual is None or actual.shape != expected.shape:
        return False
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = actual.double(), expected.double()
    return torch.allclose(actual, expected, rtol=ROUNDINGS * eps, atol=ROUNDINGS * eps * float(expected.abs().mean()))
