"""The activation functions that 8-bit MLPs and experts compute, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "relu": relu,
}
