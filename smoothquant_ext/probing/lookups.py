"""The tables that a model looks up tokens and positions in, found by their use: what they lack is an error in a kernel.

A model with learned positions has no row for a position beyond its table; on a GPU, such a lookup ends the process's
use of it. What the configuration says is not enough: the first rows of some tables stand for no position (OPT,
RoBERTa), and with rotary positions the same field is only what the model was trained on.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..traits import embedding_of
from .blocks import find_blocks
from .hooks import hooked
from .trying import attempt

ORDER = (5, 3, 8, 4, 7, 6, 9)  # token ids that are not consecutive, as positions are
aten = torch.ops.aten


@dataclass(frozen=True)
class Limits:
    """What a model can look up.

    Attributes:
        vocabulary: token ids are below this; ``None`` if unknown.
        positions: the most tokens of a row; ``None`` if no table of positions was found.
        trained: the most tokens that the configuration speaks of; ``None`` if it does not.
        width: channels of a token's embedding; ``None`` if unknown.
    """

    vocabulary: int | None = None
    positions: int | None = None
    trained: int | None = None
    width: int | None = None

    @staticmethod
    def least(limits: Iterable[Limits]) -> Limits:
        """The limits of several models that are given the same tokens."""
        each = list(limits)
        return Limits(
            *(_least(getattr(one, name) for one in each) for name in ("vocabulary", "positions", "trained", "width"))
        )


def find_limits(model: nn.Module) -> Limits:
    """Runs a model on a few tokens, up to the end of its first block, and sees where it looks them up.

    Args:
        model: any model; one that does not run on ``input_ids`` alone has the limits of its configuration. It does not
            run if it has no table but that of its tokens.
    """
    tokens, trained = _token_table(model), _trained_positions(model)
    rows: int | None = getattr(tokens, "num_embeddings", None)
    width: int | None = getattr(tokens, "embedding_dim", None)
    config = getattr(model, "config", None)
    declared = getattr(config, "max_seq_len", None)  # of MPT, which builds its biases for so many
    if rows is not None and not _has_other_tables(model, tokens):
        return Limits(rows, _least([declared]), trained, width)
    bare = [token for token in ORDER if token != getattr(config, "pad_token_id", None)]
    ids = torch.tensor([[token % rows if rows else token for token in bare]])
    watch = _Lookups(ids)
    device = next(itertools.chain(model.parameters(), model.buffers()), ids).device

    def run() -> None:
        with _until_end_of_first_block(model), watch:
            model(input_ids=ids.to(device), use_cache=False)

    attempt(run, model)  # whatever the model raises here, it raises again, and to more purpose, where it is used
    positions = _least([*watch.positions, declared])
    return Limits(_least([*watch.vocabularies, rows]), positions, trained, width)


class _EndOfFirstBlockError(Exception):
    """Ends a run whose rest is not needed."""


@contextlib.contextmanager
def _until_end_of_first_block(model: nn.Module) -> Iterator[None]:
    def end(*_: Any) -> None:
        raise _EndOfFirstBlockError

    blocks = find_blocks(model)
    with hooked({} if "" in blocks else blocks, after=end):
        yield


class _Lookups(TorchDispatchMode):
    """Notes the sizes of the tables that are read at ``ids``, and at consecutive rows."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids[0].tolist()
        self.vocabularies: list[int] = []
        self.positions: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            table, dim, index = _READS[func](*args)
            if index is not None and index.dtype != torch.bool and index.dim() and table.is_floating_point():
                self._note(table.shape[dim], index)
        return func(*args, **(kwargs or {}))

    def _note(self, rows: int, index: Tensor) -> None:
        count = len(self.ids)
        if index.shape[-1] != count or rows <= count:
            return
        read = index.reshape(-1, count)[0].tolist()
        if read == self.ids:
            self.vocabularies.append(rows)
        elif read == list(range(read[0], read[0] + count)):
            self.positions.append(rows - read[0])


def _by_tensors(table: Tensor, indices: list[Tensor | None]) -> tuple[Tensor, int, Tensor | None]:
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return (table, given[0], indices[given[0]]) if len(given) == 1 else (table, 0, None)


# Ways to read rows of a table: of their arguments the table, the dimension, and the index with its rows last.
_READS: dict[Any, Any] = {
    aten.embedding.default: lambda table, index, *_: (table, 0, index),
    aten.index_select.default: lambda table, dim, index: (table, dim, index),
    aten.gather.default: lambda table, dim, index, **_: (table, dim, index.movedim(dim, -1) if index.dim() else index),
    aten.index.Tensor: _by_tensors,
}


def _token_table(model: nn.Module) -> nn.Module | None:
    table: nn.Module | None = embedding_of(model, "input")
    return table


def _has_other_tables(model: nn.Module, tokens: nn.Module | None) -> bool:
    """Whether a model has a tensor that may be a table: anything wide but the weights of layers."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            return True
        own = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        others = [tensor for name, tensor in own.items() if name not in ("weight", "weight_scale", "bias")]
        others += [value for value in vars(module).values() if isinstance(value, Tensor)]
        if any(tensor.dim() > 1 and tensor.is_floating_point() for tensor in others):
            return True
    return False


def _trained_positions(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _least(numbers: Iterable[Any]) -> int | None:
    return min((number for number in numbers if isinstance(number, int)), default=None)
