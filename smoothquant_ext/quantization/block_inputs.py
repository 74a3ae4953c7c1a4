"""Calibration data on its way through the decoder blocks, one block at a time.

``StreamRecorder`` watches passes of the whole model and keeps what each block was called with, except what the block
before it had just returned: those tensors are made again when their turn comes, by running the blocks one after the
other. So the hidden states of one block are in memory, not those of all. Masks and position embeddings, which repeat
from window to window and from block to block, are kept once.

A model that does something between two blocks (a multiplier, a feature that is added) is recorded too: what it hands to
the second block is not the very tensor that the first returned, and is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..probing.blocks import BlockCall

COMPARED = 8  # how many recorded tensors of one shape a new one is compared with before it is kept as another


@dataclass(frozen=True)
class FromPrevious:
    """Stands for a tensor that the previous block returns: that block, and the index among its output tensors."""

    block: str
    index: int


class StreamRecorder:
    """Records the calls of blocks while a model runs, and replays them afterwards.

    ``with recorder:`` around each pass of the model records one window.

    Attributes:
        windows: how many windows were recorded.
        repeated: blocks that run more than once in a pass; the first run is recorded.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.windows = 0
        self.repeated: set[str] = set()
        self._watched = blocks
        self._calls: dict[str, list[BlockCall]] = {}
        self._kept: dict[tuple[Any, ...], list[Tensor]] = {}
        self._last: list[tuple[Tensor, int]] = []
        self._last_block = ""
        self._recorded = False
        self._handles: list[Any] = []

    def __enter__(self) -> StreamRecorder:
        for name, block in self._watched.items():

            def before(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                calls = self._calls.setdefault(name, [])
                self._recorded = len(calls) == self.windows  # not the second run in one pass, nor one that came late
                if self._recorded:
                    calls.append(BlockCall(*tree_map(self._keep, (args, kwargs))))
                else:
                    self.repeated.add(name)

            def after(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                leaves = [(leaf, leaf._version) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                self._last, self._last_block = leaves if self._recorded else [], name

            self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(after))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = []
        self.windows += 1

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for index, (tensor, version) in enumerate(self._last):
            if tensor is value and tensor._version == version:  # the very same, and not changed in place meanwhile
                return FromPrevious(self._last_block, index)
        alike = self._kept.setdefault((value.shape, value.dtype, value.device), [])
        for tensor in alike[-COMPARED:]:
            if equal(tensor, value):
                return tensor
        alike.append(value.detach().clone())
        return alike[-1]

    def calls(self, name: str, previous: Sequence[list[Tensor]]) -> list[BlockCall]:
        """The calls of a block, one a window.

        Args:
            name: the block's.
            previous: for each window the tensors that the block before it returned; empty for the first block.
        """

        def filled(call: BlockCall, outputs: list[Tensor]) -> BlockCall:
            def fill(value: Any) -> Any:
                return outputs[value.index] if isinstance(value, FromPrevious) else value

            return BlockCall(*tree_map(fill, (call.args, call.kwargs)))

        recorded = self._calls[name]
        return [filled(call, outputs) for call, outputs in zip(recorded, previous or [[]] * len(recorded), strict=True)]

    @property
    def names(self) -> list[str]:
        """The blocks that can be replayed: in every window they ran, and after the one before them here."""
        names: list[str] = []
        for name, calls in self._calls.items():
            leaves = tree_leaves([(call.args, call.kwargs) for call in calls])
            sources = {leaf.block for leaf in leaves if isinstance(leaf, FromPrevious)}
            if len(calls) == self.windows and sources <= set(names[-1:]):
                names.append(name)
        return names
