"""What a decoder block shows while calibration data passes through it in floating point.

Linear layers that are handed the very same tensor, such as q, k and v, share one input: what is measured of it is kept
once, and belongs to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..probing.blocks import BlockCall
from ..probing.linears import Linear

MOST_ROWS = 512  # of each input, kept to measure the layers that read it


@dataclass
class BlockInput:
    """One input of a block's linear layers.

    Attributes:
        readers: names, within the block, of the layers that are handed it.
        absmax: fp32 [K], largest magnitude of each channel over the windows that are not held out.
        rows: [R, K], up to ``MOST_ROWS`` rows of the held-out windows, spread evenly over them.
        hessian: fp32 [K, K], sum of ``x x^T`` over the other windows, or ``None`` if it was not asked for.
        massive: of the held-out tokens, the largest absmax over the median one, and where in its window that token is.
    """

    readers: list[str]
    absmax: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    hessian: Tensor | None = None
    massive: tuple[float, int] = (1.0, 0)


@dataclass
class Observation:
    """Of one block: its inputs by the name of their first reader, and the tensors it returned for each window."""

    inputs: dict[str, BlockInput]
    outputs: list[list[Tensor]]


def observe(
    block: nn.Module,
    linears: Mapping[str, Linear],
    calls: Sequence[BlockCall],
    held_out: set[int],
    train: set[int],
    hessians: bool,
) -> Observation:
    """Runs a block in floating point on all windows.

    Args:
        block: the decoder block.
        linears: the layers to watch, by their names within the block.
        calls: the block's arguments, a window each.
        held_out: the windows that rows are kept of.
        train: the windows that absmax and Hessians are of.
        hessians: whether to sum these up.
    """
    inputs: dict[str, BlockInput] = {}
    first_reader: dict[str, str] = {}  # decided when a layer is first seen
    outputs = []
    for window, call in enumerate(calls):
        done: set[str] = set()

        def see(name: str, first: str, x: Tensor, window: int = window, done: set[str] = done) -> None:
            if name not in first_reader:
                first_reader[name] = first_reader.get(first, first)
                inputs.setdefault(first_reader[name], BlockInput([])).readers.append(name)
            first = first_reader[name]
            if first not in done:
                done.add(first)
                rows = x.reshape(-1, x.shape[-1])
                if window in held_out:
                    _keep_rows(inputs[first], x, -(-len(rows) * len(held_out) // MOST_ROWS))
                if window in train:
                    _add_statistics(inputs[first], rows, hessians)

        outputs.append(_run(block, linears, call, see))
    return Observation(inputs, outputs)


def _run(
    block: nn.Module, linears: Mapping[str, Linear], call: BlockCall, see: Callable[[str, str, Tensor], None]
) -> list[Tensor]:
    """What the block returns. ``see`` gets each layer, the first one that was handed the same, and what that is."""
    handed: list[tuple[str, Tensor, int]] = []  # the very tensors, so that sharing shows, and their versions
    handles = []
    for name, linear in linears.items():

        def note(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0]
            handed.append((name, x, x._version))
            see(name, next(other for other, same, version in handed if same is x and version == x._version), x)

        handles.append(linear.register_forward_pre_hook(note))
    try:
        return call.replay(block)
    finally:
        for handle in handles:
            handle.remove()


def _keep_rows(target: BlockInput, x: Tensor, step: int) -> None:
    rows = x.reshape(-1, x.shape[-1])
    target.rows.append(rows[:: max(1, step)].clone())
    tokens = rows.abs().amax(1).float()
    if len(tokens):  # an expert may have been given none
        ratio = float(tokens.max() / tokens.median().clamp(min=torch.finfo(torch.float32).tiny))
        position = int(tokens.argmax()) % (x.shape[-2] if x.dim() > 1 else 1)
        target.massive = max(target.massive, (ratio, position))


def _add_statistics(target: BlockInput, x: Tensor, hessians: bool) -> None:
    wide = x.float()
    if len(x):
        seen = wide.abs().amax(dim=0)
        target.absmax = seen if target.absmax is None else torch.maximum(target.absmax, seen)
    if hessians:
        if target.hessian is None:
            target.hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        target.hessian.addmm_(wide.t(), wide)
