"""Finds modules that an 8-bit module cannot take the place of, because they are not only called under their name.

A model may read a layer's weight (``F.linear(x, self.proj.weight)``) or its dtype, or keep a second reference to it
(``functools.partial(self.proj)``). Putting another module in the layer's place would change such a model, or break it.
The model is run once with stand-ins in all these places.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from .hooks import hooked, swapped

# What every module has, and what an 8-bit one has besides; the values of the latter are looked at when they are used.
COMMON = {*dir(nn.Module()), "in_features", "out_features", "num_experts", "weight", "bias"}
COMMON |= {"num_embeddings", "embedding_dim"}
INPUT = {"input", "x"}  # what a linear layer's argument is called
# Questions whose answer is the same for an 8-bit weight, which may be packed: its shape is not among them.
SAME_FOR_8_BITS = {
    *(Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.is_cpu.__get__, Tensor.is_meta.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.is_leaf.__get__),  # type: ignore[attr-defined]
}


@contextmanager
def stand_ins(
    model: nn.Module, modules: Mapping[str, nn.Module], harmless: Set[Any] = frozenset(SAME_FOR_8_BITS)
) -> Iterator[dict[str, str]]:
    """Puts stand-ins in the places of modules until the ``with`` body ends, which runs the model.

    Args:
        model: the model.
        modules: by name.
        harmless: functions that a parameter may be given while none of its modules runs.

    Yields:
        For the name of each module that was used by something other than a call under its name, how.
    """
    uses: dict[str, str] = {}
    running: list[int] = []
    places = {
        name: _StandIn(module, functools.partial(uses.setdefault, name), running) for name, module in modules.items()
    }

    def note(name: str, args: Any, kwargs: Any) -> None:
        if isinstance(modules[name], nn.Linear | Conv1D) and (
            len(args) + len(kwargs) != 1 or not kwargs.keys() <= INPUT
        ):
            uses.setdefault(name, "it is called with arguments that an 8-bit layer does not take")
        if id(modules[name]) not in running:
            uses.setdefault(name, "it is called through another reference than its place in the model")

    reads = _Reads(model, modules, uses, running, harmless)
    with swapped(model, places), hooked(modules, before=note), reads:
        yield uses


class _StandIn(nn.Module):
    """Calls a module, and notes what else is wanted of it."""

    def __init__(self, module: nn.Module, note: Any, running: list[int]) -> None:
        super().__init__()
        vars(self).update(_behind=module, _note=note, _running=running)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        behind, running = vars(self)["_behind"], vars(self)["_running"]
        running.append(id(behind))
        try:
            return behind(*args, **kwargs)
        finally:
            running.pop()

    def __getattr__(self, name: str) -> Any:
        behind, note = vars(self)["_behind"], vars(self)["_note"]
        value = getattr(behind, name)
        if name in ("weight", "bias"):
            if name not in behind._parameters:
                note(f"its {name}, which is computed from other parameters, is read elsewhere")
        elif name not in COMMON and not name.startswith("_") and name not in behind._parameters:
            note(f"its attribute {name} is read elsewhere, which an 8-bit layer does not have")
        return value


class _Reads(TorchFunctionMode):
    """Notes functions that are given a parameter while none of its modules runs."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        uses: dict[str, str],
        running: list[int],
        harmless: Set[Any],
    ) -> None:
        super().__init__()
        self.uses, self.running, self.harmless = uses, running, harmless
        names = {id(module): name for name, module in modules.items()}
        owners: dict[int, set[int]] = {}
        everything = [*model.modules(), *modules.values()]  # behind stand-ins
        for module in everything:
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), set()).add(id(module))
        # A parameter of another module too may be read by that; 8 bits in one leave the other its own.
        self.owners = {
            id(parameter): (owners[id(parameter)], names[id(module)], kind)
            for module in modules.values()
            for kind, parameter in module._parameters.items()
            if parameter is not None and owners[id(parameter)] <= names.keys()
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.harmless:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor) and (owner := self.owners.get(id(value))) is not None:
                    modules, name, kind = owner
                    if not modules & set(self.running):
                        self.uses.setdefault(name, f"its {kind} is read by something other than its own forward pass")
        return func(*args, **kwargs)
