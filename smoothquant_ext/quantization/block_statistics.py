"""Collects statistics of a decoder block's inputs while calibration data passes through it in floating point.

Linear layers that are handed the very same tensor, such as q, k and v, share one input: its statistics are kept once,
and belong to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..hadamard import rotate_blocks
from ..probing.blocks import BlockCall
from ..probing.hooks import hooked
from ..probing.linears import Linear
from ..probing.numerics import outlier_ratio
from ..probing.values import first_argument, version_of

MOST_ROWS = 512  # of each input, kept to measure the layers that consume it


class Windows(NamedTuple):
    """The numbers of the windows that choices are measured on, and of those that they are made from."""

    held_out: set[int]
    train: set[int]


@dataclass
class BlockInput:
    """One input of a block's linear layers.

    Attributes:
        consumers: names, within the block, of the layers that are handed it.
        rotate: the size of its blocks that are rotated before absmax and the massive token are taken, or 0.
        absmax: fp32 [K], largest magnitude of each channel over the windows that are not held out.
        rows: [R, K] each, up to ``MOST_ROWS`` rows of the held-out windows, spread evenly over them.
        hessian: fp32 [K, K], sum of ``x x^T`` over the other windows, or ``None`` if it was not asked for.
        massive: of the held-out tokens, the largest absmax over the median one, and that token's position in its
            window.
    """

    consumers: list[str]
    rotate: int = 0
    absmax: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    hessian: Tensor | None = None
    massive: tuple[float, int] = (1.0, 0)

    def keep_rows(self, x: Tensor, step: int) -> None:
        """Keeps every ``step``-th row of x [..., K], and notes a massive token."""
        rows = x.reshape(-1, x.shape[-1])
        self.rows.append(rows[:: max(1, step)].clone())
        tokens = rotate_blocks(rows, self.rotate).abs().amax(1).float()
        if len(tokens):  # an expert may have been given none
            position = int(tokens.argmax()) % (x.shape[-2] if x.dim() > 1 else 1)
            self.massive = max(self.massive, (outlier_ratio(tokens), position))

    def add(self, rows: Tensor, with_hessian: bool) -> None:
        """Adds rows [R, K] to the absmax, and to the Hessian if asked for."""
        wide = rows.float()
        if len(rows):
            largest = rotate_blocks(wide, self.rotate).abs().amax(dim=0)
            self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)
        if with_hessian:
            if self.hessian is None:
                self.hessian = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.hessian.addmm_(wide.t(), wide)


@dataclass
class BlockStatistics:
    """Statistics of one block.

    Attributes:
        inputs: the inputs of its linear layers, each by the name of its first consumer.
        outputs: the tensors that the block returned for each window.
    """

    inputs: dict[str, BlockInput] = field(default_factory=dict)
    outputs: list[list[Tensor]] = field(default_factory=list)


def collect_statistics(
    block: nn.Module,
    linears: Mapping[str, Linear],
    calls: Sequence[BlockCall],
    windows: Windows,
    hessians: bool,
    keep: Callable[[Tensor], Tensor] = lambda output: output,
    rotated: Mapping[str, int] = MappingProxyType({}),
) -> BlockStatistics:
    """Runs a block in floating point on all windows.

    Args:
        block: the decoder block.
        linears: the layers to watch, by their names within the block.
        calls: the block's arguments, a window each.
        windows: which calls rows are kept of, and which absmax and Hessians are of.
        hessians: whether to sum these up.
        keep: moves an output to where it is to wait.
        rotated: of layers whose ranges are those of the rotated input the size of its blocks, by their names within the
            block.
    """
    statistics = BlockStatistics()
    first_consumer: dict[str, str] = {}  # of each layer's input, decided in the layer's first run
    # Of the present window: the very tensors that layers were handed, with their versions, so that sharing shows, and
    # the inputs that are counted already.
    handed: list[tuple[str, Tensor, int]] = []
    counted: set[str] = set()

    def collect(name: str, args: Any, kwargs: Any) -> None:
        x = first_argument(args, kwargs)
        handed.append((name, x, version_of(x)))
        if name not in first_consumer:
            first = next(other for other, tensor, version in handed if tensor is x and version == version_of(x))
            first_consumer[name] = first_consumer.get(first, first)
            source = statistics.inputs.setdefault(first_consumer[name], BlockInput([], rotated.get(name, 0)))
            source.consumers.append(name)
        first = first_consumer[name]
        if first in counted:
            return
        counted.add(first)
        rows = x.reshape(-1, x.shape[-1])
        if window in windows.held_out:
            statistics.inputs[first].keep_rows(x, -(-len(rows) * len(windows.held_out) // MOST_ROWS))
        if window in windows.train:
            statistics.inputs[first].add(rows, hessians)

    with hooked(linears, before=collect):
        for window in range(len(calls)):
            handed.clear()
            counted.clear()
            statistics.outputs.append([keep(output) for output in calls[window].replay(block)])
    return statistics
