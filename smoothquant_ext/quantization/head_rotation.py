"""R2: rotates the values of attention head by head, and the projection behind the attention back (see ``rotation``)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..hadamard import rotation
from ..probing.copies import copy_of
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.smoothing_groups import BlockProber, Discovery
from ..probing.structure import Block, Structure
from .report import Rotations
from .residual_rotation import wide
from .smoothing import Proof

SMALLEST_HEAD = 8  # channels; a rotation of fewer spreads nothing


def rotate_heads_(
    structure: Structure,
    block: Block,
    seed: int,
    hints: dict[tuple[type, str, int], Any],
    headless: set[tuple[type, str, int]],
    result: Rotations,
) -> None:
    """Rotates the values of a block's attention, in heads as large as the block allows.

    ``hints`` are of ``BlockProber``. ``headless`` are producers of earlier blocks, by the class of their block, that no
    size fits, such as up in ``silu(gate) * up``; updated.
    """
    discovery = Discovery()
    BlockProber(block, structure.tied, hints).find_groups(discovery, kinds=("linear",))
    for group in discovery.groups:
        consumer, channel_map = next(iter(group.consumers.items()))
        if len(group.consumers) > 1 or not is_linear(block.find(consumer)):
            continue
        key = type(block.module), block.local_name(group.producer), group.channels
        sizes = [] if key in headless else _head_sizes(channel_map)
        proof = Proof(block) if sizes else None
        for size in sizes:
            assert proof is not None
            heads, turn = _heads(channel_map, size), rotation(size, seed)
            members = block.find(group.producer, proof.module), block.find(consumer, proof.module)
            if not proof.attempt(members, partial(_fold_heads_, *members, heads, turn)):
                result.heads[consumer] = size
                home = [structure.model.get_submodule(name) for name in (group.producer, consumer)]
                producer, reader = copies = [copy_of(module) for module in home]
                _fold_heads_(producer, reader, heads, turn)
                for module, other in zip(home, copies, strict=True):
                    module._parameters.update(other._parameters)
                break
        else:
            headless.add(key)


def _head_sizes(channel_map: Tensor) -> list[int]:
    """The sizes of heads that a channel map may have, the largest first."""
    width = len(channel_map)
    sizes = [size for size in range(width, SMALLEST_HEAD - 1, -1) if width % size == 0]
    return [size for size in sizes if _heads(channel_map, size)]


def _heads(channel_map: Tensor, size: int) -> list[Tensor]:
    """The producer's channels behind each run of ``size`` input channels; empty if two runs share a part of theirs."""
    heads = list(channel_map.reshape(-1, size))
    distinct = {tuple(head.tolist()) for head in heads}
    channels = [channel for head in distinct for channel in head]
    return heads if min(channels) >= 0 and len(set(channels)) == len(channels) else []


def _fold_heads_(producer: nn.Module, consumer: nn.Module, heads: Sequence[Tensor], turn: Tensor) -> None:
    """Rotates the rows of the producer's heads and the columns of the consumer's, in place."""
    rows, bias = weight_nk(as_linear(producer)), values_of(producer, "bias")
    columns = weight_nk(as_linear(consumer))
    turn = turn.to(wide(rows))
    size = len(turn)
    for index in {tuple(head.tolist()) for head in heads}:
        rows[list(index)] = (turn.t() @ wide(rows[list(index)])).to(rows)
        if bias is not None:
            bias[list(index)] = (wide(bias[list(index)]) @ turn).to(bias)
    for start in range(0, columns.shape[1], size):
        part = columns[:, start : start + size]
        part.copy_(wide(part) @ turn)
