"""R4: finds the layers whose input is rotated at run time (see ``rotation``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..hadamard import block_size
from ..probing.blocks import BlockCall
from ..probing.hooks import hooked
from ..probing.linears import as_linear, weight_nk
from ..probing.norms import looks_like_norm
from ..probing.residual import hidden_state, stream_width, with_hidden_state
from ..probing.stream_prober import NoResidualStream
from ..probing.structure import Block
from ..probing.trying import Failed, attempt
from ..probing.values import first_argument, map_values


def find_online(block: Block, rotated: Collection[str]) -> dict[str, int]:
    """The layers of a block that read what other matrices of the block made, and what the ``down`` of experts reads.

    What reads the hidden states, through a norm or not, is left out: R1 rotates these. So is what else reads the output
    of a norm, which smoothing is folded into.

    Args:
        block: a block, with its call.
        rotated: names of layers whose input is rotated already; left out.

    Returns:
        The size of the blocks of channels to rotate, for each name, and for the names of experts and ``.down``: the
        largest that the ops have and that divides the width. Widths that no such size divides are left out.
    """
    behind = attempt(lambda: _behind_matrices(block), block.module)
    widths = _widths(block, [] if isinstance(behind, Failed) else behind)
    widths |= {f"{name}.down": inner for name, (_, inner) in _expert_widths(block).items()}
    return _sizes(widths, rotated)


def find_all(block: Block, rotated: Collection[str]) -> dict[str, int]:
    """All layers of a block and its experts, arguments and results as those of ``find_online``."""
    widths = _widths(block, block.linears)
    for name, (width, inner) in _expert_widths(block).items():
        widths |= {name: width, f"{name}.down": inner}
    return _sizes(widths, rotated)


def _widths(block: Block, names: Iterable[str]) -> dict[str, int]:
    """Of layers, by their local names, the width of what they read."""
    return {block.full_name(name): weight_nk(as_linear(block.module.get_submodule(name))).shape[1] for name in names}


def _expert_widths(block: Block) -> dict[str, tuple[int, int]]:
    """Of experts the widths of what they read, and of what their ``down`` does."""
    widths = {}
    for name, layout in block.experts.items():
        parameters = dict(block.module.get_submodule(name).named_parameters(recurse=False))
        shapes = [part.weight(parameters).shape for part in (layout.gate, layout.down)]
        widths[block.full_name(name)] = shapes[0][-1], shapes[1][-1]
    return widths


def _sizes(widths: Mapping[str, int], rotated: Collection[str]) -> dict[str, int]:
    sizes = {name: block_size(width) for name, width in widths.items() if name not in rotated}
    return {name: size for name, size in sizes.items() if size}


def _behind_matrices(block: Block) -> list[str]:
    """Local names of the linear layers that are handed the same input when the hidden states change, and all matrices
    return what they returned before; without those that are handed the output of a norm.
    """
    call = block.call
    assert call is not None
    try:
        hidden = hidden_state(call, stream_width(call))
    except NoResidualStream:
        return []
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    matrices = {name: block.module.get_submodule(name) for name in block.consumers}
    others = {name: each for name, each in block.module.named_modules() if name not in matrices}
    outputs: dict[str, list[Any]] = {name: [] for name in matrices}
    normed: list[Tensor] = []
    behind_norm: set[str] = set()

    def inputs_of(given: BlockCall, is_frozen: bool) -> dict[str, list[Tensor]]:
        inputs: dict[str, list[Tensor]] = {}
        left = {name: iter(made) for name, made in outputs.items()}

        def before(name: str, args: Any, kwargs: Any) -> None:
            x = first_argument(args, kwargs)
            if isinstance(x, Tensor):
                inputs.setdefault(name, []).append(x.detach().clone())
                if any(x.untyped_storage().data_ptr() == each.untyped_storage().data_ptr() for each in normed):
                    behind_norm.add(name)

        def after(name: str, _args: Any, _kwargs: Any, output: Any) -> Any:
            if is_frozen:
                return map_values(torch.clone, next(left[name]))
            outputs[name].append(map_values(torch.clone, output))
            return None

        def note_norm(name: str, args: Any, _kwargs: Any, output: Any) -> None:
            if looks_like_norm(others[name], args, output):
                normed.append(output)

        with hooked(matrices, before, after), hooked(others, after=note_norm):
            given.replay(block.module)
        return inputs

    first = inputs_of(call, is_frozen=False)
    moved = inputs_of(with_hidden_state(call, hidden, hidden + noise), is_frozen=True)
    return [
        name
        for name in block.linears
        if name in first
        and name not in behind_norm
        and len(first[name]) == len(moved[name])
        and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first[name], moved[name], strict=True))
    ]
