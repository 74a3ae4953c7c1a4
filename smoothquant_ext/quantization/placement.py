"""Where the blocks of a model run: with the model, or one at a time on a GPU that is too small for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..devices import free_memory, named_device
from ..errors import SmoothQuantError
from ..probing.blocks import device_of, find_blocks
from ..probing.copies import copy_of
from ..probing.structure import Block, Structure
from ..progress import say

# A block under work: its copy, one in fp32, one in 8 bits, one in fp64 for the proof, their weights' temporaries.
COPIES = 6
ACTIVATIONS = 1 << 30  # bytes beside the weights: of a window in the widest layer, its logits, what is recorded

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Placement:
    """Where blocks run.

    Attributes:
        device: the device.
        streams: whether the model is elsewhere, so that each block comes here for as long as it runs.
        room: bytes of the device that work on a block takes.
    """

    device: torch.device
    streams: bool = False
    room: int = 0

    def copy(self, block: Block) -> Block:
        """The same block with a copy of its module, on the device."""
        return replace(block, module=_copy_on(block.module, self.device if self.streams else None))

    def blocks_of(self, structure: Structure) -> Structure:
        """The same structure with blocks that are on the device: each is copied when it is asked for."""
        return replace(structure, blocks=_Copies(structure.blocks, self)) if self.streams else structure

    @contextmanager
    def running(self, structure: Structure, unchanged: bool = False) -> Iterator[None]:
        """Makes the blocks run on the device when the model runs, until the ``with`` body ends.

        With ``unchanged``, for blocks that do not change meanwhile, as many as there is room for stay there.
        """
        if not self.streams:
            yield
            return
        modules = list(structure.modules.values())
        forwards = [vars(module).get("forward") for module in modules]  # some tools set one
        try:
            for module in modules:
                module.forward = _Streamed(module, self, unchanged)
            yield
        finally:
            for module, forward in zip(modules, forwards, strict=True):
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward

    def keep(self, value: Tensor) -> Tensor:
        """A tensor that waits for another block to run: on the device while there is room, else in main memory."""
        return value.cpu() if self.streams and not self.has_room(value.nbytes) else value

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more leave enough to work on a block."""
        return free_memory(self.device) >= self.room + size

    def sent_home(self, modules: Mapping[str, Module], home: torch.device) -> dict[str, Module]:
        """The 8-bit modules of a block, moved to where the model is."""
        return {name: module.to(home) for name, module in modules.items()} if self.streams else dict(modules)


class _Streamed:
    """The forward of a block that runs on another device, on a copy there, made anew for each call or once."""

    def __init__(self, module: nn.Module, placement: Placement, unchanged: bool) -> None:
        self.module, self.placement, self.unchanged = module, placement, unchanged
        self.resident: nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes arguments and gives the output where the model is."""
        device = self.placement.device
        there = self.resident or _copy_on(self.module, device)
        if self.unchanged and self.placement.has_room(0):
            self.resident = there
        return _moved(there.forward(*_moved(args, device), **_moved(kwargs, device)), device_of(self.module))


class _Copies(Mapping[str, Block]):
    """Blocks by name, copied to a device when they are asked for, and not kept."""

    def __init__(self, blocks: Mapping[str, Block], placement: Placement) -> None:
        self.blocks, self.placement = blocks, placement

    def __getitem__(self, name: str) -> Block:
        return self.placement.copy(self.blocks[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)


def place_(model: nn.Module, device: torch.device | str | None, show: bool) -> Placement:
    """Moves a model to a device if it fits there with all that quantization needs; else its blocks come one by one.

    Args:
        model: a model in floating point.
        device: where to compute; see ``named_device``. ``None``: where the model is.
        show: whether to say on stderr which of the two it is.

    Raises:
        SmoothQuantError: the device is not there, or the model is spread over several.
    """
    present = next(model.parameters()).device
    if device is None:
        return Placement(present)
    wanted = named_device(device)
    if wanted.type == present.type and wanted.index in (None, present.index):
        return Placement(present)
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise SmoothQuantError(f"the model is spread over several devices: load it on the CPU, then give {wanted}")
    if wanted.type == "cpu":
        model.to(wanted)
        return Placement(wanted)
    (whole, room), free = bytes_needed(model), free_memory(wanted)
    needed = whole + room
    what = f"The model takes {needed / 1e9:.1f} GB to quantize, {free / 1e9:.1f} are free on {wanted}"
    if needed > free:
        say(f"{what}: one block at a time goes there, the model stays on the CPU", show)
        return Placement(wanted, True, room)
    say(f"{what}: it moves there", show)
    model.to(wanted)
    return Placement(wanted)


def bytes_needed(model: nn.Module) -> tuple[int, int]:
    """Estimates of memory: of a model beside its 8-bit copy, and of the work on a block."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    numbers = [sum(parameter.numel() for parameter in block.parameters()) for block in find_blocks(model).values()]
    return sum(tensor.nbytes + tensor.numel() for tensor in tensors), COPIES * 4 * max(numbers) + ACTIVATIONS


def _copy_on(module: Module, device: torch.device | None) -> Module:
    """A copy of a module on a device, by default where it is, with its hooks, but without a forward of ``running``."""
    memo: dict[int, Any] = {}
    if device is not None:
        # Parameters go there at once. Buffers follow, in the way of their module: 8-bit weights are packed on the CPU.
        for parameter in module.parameters():
            values = parameter.detach().to(device, copy=True)
            memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    forward = vars(module).get("forward")
    if isinstance(forward, _Streamed):
        memo[id(forward)] = forward
    other = copy_of(module, memo)
    if isinstance(forward, _Streamed):
        del other.forward
    return other if device is None else other.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)
