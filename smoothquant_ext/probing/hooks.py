"""Watching and replacing modules of a model for a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .trying import attempt

Before = Callable[[str, Any, Any], Any]
After = Callable[[str, Any, Any, Any], Any]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Calls ``before`` and ``after`` around every forward pass of the modules, until the ``with`` body ends or fails.

    Args:
        modules: the modules to watch, by any name.
        before: ``before(name, args, kwargs)`` returns ``None``, or the ``(args, kwargs)`` to run the module with.
        after: ``after(name, args, kwargs, output)`` returns ``None``, or the output to return in place of the module's.
    """
    handles = []
    try:
        for name, module in modules.items():
            if before is not None:
                handles.append(module.register_forward_pre_hook(_without_module(before, name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(_without_module(after, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x, or ``None`` if it is not a function of one tensor."""
    output = attempt(lambda: module(x), module)
    return output if isinstance(output, Tensor) else None


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts ``modules`` in the places of the modules of ``model`` with these names, until the ``with`` body ends."""
    originals = {id(module): model.get_submodule(name) for name, module in modules.items()}
    places = replace_(model, modules)
    try:
        yield
    finally:
        for parent, name, module in places:
            parent._modules[name] = originals[id(module)]


def replace_(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Puts ``modules`` in the places of the modules of ``model`` with these names, wherever else these are registered.

    Returns:
        The places: the parent, the name in it, and what is there now.
    """
    others = {id(model.get_submodule(name)): module for name, module in modules.items()}
    places = [
        (parent, name, others[id(child)])
        for parent in model.modules()
        for name, child in parent._modules.items()
        if id(child) in others
    ]
    for parent, name, module in places:
        parent._modules[name] = module
    return places


def is_watched(module: nn.Module) -> bool:
    """Whether someone waits for this module's call: hooks, or accelerate, which puts a ``forward`` in its place.

    accelerate's hooks may bring the module's tensors to a GPU before the call and take them away after it. Those that
    do not only bring the input to the module's device, where a fused module finds it anyway.
    """
    own = module.__dict__
    if own["_forward_pre_hooks"] or own["_forward_hooks"]:
        return True
    if "forward" not in own or getattr(own["forward"], "__func__", None) is type(module).forward:
        return False
    return getattr(own.get("_hf_hook"), "offload", True) is not False


def _without_module(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda _module, *arguments: hook(name, *arguments)
