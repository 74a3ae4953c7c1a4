"""Calibration data on its way through the decoder blocks, one block at a time.

``BlockInputRecorder`` watches passes of the whole model and keeps the arguments of each block's call, except tensors
that the block before it had just returned: those are made again when their turn comes, by running the blocks one after
the other. So the hidden states of one block are in memory, not those of all. Masks and position embeddings, which
repeat from window to window and from block to block, are kept once.

A model may compute something between two blocks (a multiplier, a feature that is added). Then the argument of the
second block is not the very tensor that the first returned, and is kept as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, equal, nn

from ..probing.blocks import BlockCall
from ..probing.hooks import hooked
from ..probing.values import leaves_of, map_values, tensors_in, version_of

COMPARED = 8  # how many recorded tensors of one shape a new one is compared with before it is kept as another


@dataclass(frozen=True)
class FromPrevious:
    """Stands for a tensor that the previous block returns: that block, and the index among its output tensors."""

    block: str
    index: int


class BlockInputRecorder:
    """Records the calls of blocks while a model runs, to replay them afterwards.

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

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records one window: the pass of the model in the ``with`` body."""
        try:
            with hooked(self._watched, before=self._before, after=self._after):
                yield
        finally:
            self._last = []
            self.windows += 1

    def _before(self, name: str, args: Any, kwargs: Any) -> None:
        calls = self._calls.setdefault(name, [])
        self._recorded = len(calls) == self.windows  # not the second run in one pass, nor one that came late
        if self._recorded:
            calls.append(BlockCall(*map_values(self._keep, (args, kwargs))))
        else:
            self.repeated.add(name)

    def _after(self, name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        leaves = [(tensor, version_of(tensor)) for tensor in tensors_in(output)]
        self._last, self._last_block = leaves if self._recorded else [], name

    def _keep(self, value: Tensor) -> Tensor | FromPrevious:
        for index, (tensor, version) in enumerate(self._last):
            if tensor is value and version_of(tensor) == version:  # the very same, and not changed in place meanwhile
                return FromPrevious(self._last_block, index)
        kept = self._kept.setdefault((value.shape, value.dtype, value.device), [])
        for tensor in kept[-COMPARED:]:
            if equal(tensor, value):
                return tensor.detach()  # another object: equal arguments need not be the same one
        kept.append(value.detach().clone())
        return kept[-1].detach()

    def calls(self, name: str, previous: Sequence[list[Tensor]]) -> list[BlockCall]:
        """The calls of a block, one a window.

        Args:
            name: the block's name.
            previous: for each window the tensors that the block before it returned; empty for the first block.
        """

        def filled(call: BlockCall, outputs: list[Tensor]) -> BlockCall:
            def fill(value: Tensor | FromPrevious) -> Tensor:
                return outputs[value.index] if isinstance(value, FromPrevious) else value

            return BlockCall(*map_values(fill, (call.args, call.kwargs), (Tensor, FromPrevious)))

        recorded = self._calls[name]
        return [filled(call, outputs) for call, outputs in zip(recorded, previous or [[]] * len(recorded), strict=True)]

    @property
    def names(self) -> list[str]:
        """The blocks that can be replayed: in every window they ran, and after the one before them here."""
        names: list[str] = []
        for name, calls in self._calls.items():
            sources = {each.block for call in calls for each in leaves_of((call.args, call.kwargs), FromPrevious)}
            if len(calls) == self.windows and sources <= set(names[-1:]):
                names.append(name)
        return names
