"""Trying a module out: whatever it raises becomes a reason, and whatever it changes is changed back.

The structure of a model is found by running its modules, on noise and in dtypes that they may not be made for. Some
raise what they like, some count their calls, keep their attention weights, write into their buffers or draw random
numbers. A trial that fails means "not found here"; a model that was tried out is what it was.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compat import first_line
from .state import State

Result = TypeVar("Result")

LONGEST_REASON = 160  # characters of a module's own message
# These are no answer of the module that is tried: memory is full, or the GPU takes no more work.
NOT_OF_THE_MODULE = (torch.OutOfMemoryError, MemoryError, torch.AcceleratorError)


@dataclass(frozen=True)
class Failed:
    """The result of a trial that raised."""

    error: Exception

    @property
    def reason(self) -> str:
        """The exception in a few words."""
        return in_words(self.error)


def attempt(action: Callable[[], Result], *modules: nn.Module) -> Result | Failed:
    """Runs ``action`` without gradients and returns its result, or ``Failed`` if it raised, be it what it may.

    Interrupts, exits and exhausted memory go through. In every case the modules, random numbers and torch's settings
    are what they were before; see ``untouched``.

    Args:
        action: runs the modules.
        modules: what it runs, except for copies that are made for trials.
    """
    try:
        with untouched(*modules), torch.no_grad():
            return action()
    except NOT_OF_THE_MODULE:
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # the CPU's, a RuntimeError
            raise
        return Failed(error)


def in_words(error: BaseException) -> str:
    """An exception's class and the first line of its message."""
    name, message = type(error).__name__, first_line(error)
    return name if message == name else f"{name}: {message[:LONGEST_REASON]}"


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Changes back what the ``with`` body does to modules by running them, and to everything that they may set.

    - parameters and buffers, and other tensors that modules hold: the objects, and values written into them
    - attributes, training flags, ``requires_grad``, hooks, containers and objects that modules hold
    - random states of torch, Python and numpy; the default dtype; whether gradients are recorded

    Compiled modules run as they are written meanwhile, so that hooks in them are called.
    """
    devices = {parameter.device for module in modules for parameter in module.parameters()}
    surroundings, states = _Surroundings(devices), [State(module) for module in modules]
    writes = _Writes(states) if modules else None
    try:
        with uncompiled(), writes or nullcontext():
            yield
    finally:
        if writes is not None:
            writes.undo_()
        for state in states:
            state.restore_()
        surroundings.restore_()


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and a device are the same in every ``with`` body, and go on after it as if without."""
    surroundings = _Surroundings({device})
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    for generator, _ in surroundings.gpus:
        generator.manual_seed(0)
    try:
        yield
    finally:
        surroundings.restore_()


def uncompiled() -> Any:
    """Compiled modules run as they are written until the ``with`` body ends, so that hooks in them are called."""
    # Nothing is compiled before this is imported, which takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Surroundings:
    """What a forward pass may change besides its model."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        # There are no generators before the first use of a GPU.
        gpus = {device.index or 0 for device in devices if device.type == "cuda"}
        self.gpus = [(each, each.get_state()) for each in map(_generator, sorted(gpus)) if each is not None]
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.settings = torch.get_default_dtype(), torch.is_grad_enabled()

    def restore_(self) -> None:
        torch_state, python_state, numpy_state = self.random
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in self.gpus:
            generator.set_state(state)
        dtype, grad = self.settings
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def _generator(gpu: int) -> torch.Generator | None:
    generators = torch.cuda.default_generators
    return generators[gpu] if gpu < len(generators) else None


class _Writes(TorchDispatchMode):
    """Keeps what was in the tensors of modules before an op writes into them: only these are copied."""

    supports_higher_order_operators = True

    def __init__(self, states: Iterable[State]) -> None:
        super().__init__()
        self.tensors: dict[int, list[Tensor]] = {}
        self.before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for state in states:
            for tensor in state.tensors():
                if (address := _address(tensor)) is not None:
                    self.tensors.setdefault(address, []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for position, name in _written(func):
            value = kwargs[name] if name in kwargs else args[position] if position < len(args) else None
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    self._keep(_address(tensor))
        return func(*args, **kwargs)

    def _keep(self, address: int | None) -> None:
        if address in self.tensors and address not in self.before:
            self.before[address] = [(tensor, tensor.detach().clone()) for tensor in self.tensors[address]]

    def undo_(self) -> None:
        for tensor, value in (pair for pairs in self.before.values() for pair in pairs):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.detach().copy_(value)


@functools.cache
def _written(func: Any) -> list[tuple[int, str]]:
    """The position and name of each argument that an op writes into."""
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None else schema.arguments
    return [
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _address(tensor: Tensor) -> int | None:
    """Of the memory behind a tensor; ``None`` where it has none: on the meta device, in some subclasses."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None
