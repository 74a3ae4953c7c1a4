"""Puts a model back together as it was if its quantization fails.

What quantization does to a model is to exchange parameters, buffers, modules and classes; it writes into no tensor. So
the model as it was is a matter of references, which cost nothing to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..probing.state import State


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Undoes what the ``with`` body did to a model if it raises, be it an error or an interrupt.

    Modules, classes, parameters, buffers, hooks, devices and configurations are as before then. Values that were
    written into a tensor are not.
    """
    before = State(model)
    try:
        yield
    except BaseException:
        before.restore_()
        raise
