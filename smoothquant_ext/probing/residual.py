"""Finds which matrices of a decoder block read the residual stream and which write to it, by running the block.

Rotating the residual stream changes nothing if every matrix that reads it is rotated, and every matrix that writes to
it (QuaRot, Ashkboos et al. 2024, section 4). Which those are shows in what they compute:

1. **Writers.** With the outputs of all matrices and norms held fixed, a module whose output moves along one direction
   moves the block's output along the same direction, and no other, exactly if it is added to the stream. A norm that
   does so, as behind the attention of Gemma 2, forbids the rotation: its weight stands between channel and channel.
2. **Readers.** The block is run on a rotated input, with each writer's output rotated, each norm without its weight,
   and all other matrices returning what they returned before. A matrix that is handed a rotated input reads the stream;
   one that is handed what it was before does not; one that is handed something else forbids the rotation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .blocks import Batch, BlockCall, run_model
from .hooks import hooked
from .linears import is_linear, values_of
from .stream_prober import NoResidualStream, ResidualStream, StreamProber, copied
from .structure import Block, Structure

# Norms, rotary embeddings and softmax compute in fp32 whatever their input: a few dozen roundings.
TOLERANCE = 64 * torch.finfo(torch.float32).eps
# Of a whole model in its own dtype: a rotation, a norm, and what lies between them.
NATIVE_ROUNDINGS = 8


def stream_width(call: BlockCall) -> int:
    """The last dimension of the hidden states that a block is called with.

    Raises:
        NoResidualStream: there are none.
    """
    for leaf in tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3:
            return int(leaf.shape[-1])
    raise NoResidualStream("is called without hidden states")


def hidden_state(call: BlockCall, width: int) -> Tensor:
    """The first floating-point tensor [..., width] among the arguments of a block's call.

    Raises:
        NoResidualStream: there is none.
    """
    for leaf in tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1 and leaf.shape[-1] == width:
            return leaf
    raise NoResidualStream(f"is called without hidden states of {width} channels")


def with_hidden_state(call: BlockCall, hidden: Tensor, other: Tensor) -> BlockCall:
    """The same call with ``other`` in place of ``hidden``, wherever it is among the arguments."""
    return BlockCall(*tree_map(lambda leaf: other if leaf is hidden else leaf, (call.args, call.kwargs)))


def find_block_stream(block: Block, module: nn.Module, rotation: Tensor) -> ResidualStream:
    """Finds the readers and writers of a block's residual stream.

    Args:
        block: the block; its call is what it is run with.
        module: a copy of its module in fp64 or fp32, left as it is.
        rotation: fp64 [D, D], of the stream.

    Raises:
        NoResidualStream: the stream cannot be rotated.
    """
    call = block.call
    assert call is not None
    captured = hidden_state(call, len(rotation))
    parameter = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    hidden = captured.to(parameter)

    def run(values: Tensor) -> list[Tensor]:
        return with_hidden_state(call, captured, values).replay(module, parameter.dtype)

    matrices = {name: module.get_submodule(name) for name in block.consumers}
    prober = StreamProber(module, matrices, rotation.to(parameter), TOLERANCE)
    with prober.recording():
        outputs = run(hidden)
    is_stream = [output.is_floating_point() and output.shape == hidden.shape for output in outputs]
    if not any(is_stream):
        raise NoResidualStream("returns no hidden states")

    def streams(moved: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(itertools.compress(zip(moved, outputs, strict=True), is_stream))

    with prober.frozen():
        moved = run(hidden + prober.direction)
    if not prober.moved_along(prober.direction, streams(moved)):
        raise NoResidualStream("does not pass its input on beside what its matrices add")
    writers = []
    for name in prober.candidates():
        with prober.frozen(moving=name):
            pairs = streams(run(hidden))
        if all(torch.equal(a, b) for a, b in pairs):
            continue
        prober.check_writer(name, prober.moved_along(prober.direction, pairs))
        writers.append(name)
    with prober.turned(writers) as readers:
        turned = run(prober.rotated(hidden))
    for actual, expected, stream in zip(turned, outputs, is_stream, strict=True):
        prober.check_result(actual, prober.rotated(expected) if stream else expected)
    return prober.stream(readers, writers)


def find_outer_stream(structure: Structure, batch: Batch, rotation: Tensor) -> ResidualStream:
    """Finds the readers and writers of the residual stream outside of the blocks: embeddings, the last norm, the head.

    Args:
        structure: of the model, which is run as it is, in its dtype.
        batch: what it is run with.
        rotation: fp64 [D, D], of the stream; every block takes and returns it.

    Raises:
        NoResidualStream: the stream cannot be rotated.
    """
    model, width = structure.model, len(rotation)
    inside = tuple(f"{name}." for name in structure.blocks)
    modules = {name: each for name, each in model.named_modules() if not name.startswith(inside)}
    matrices = {n: each for n, each in modules.items() if is_linear(each) or isinstance(each, nn.Embedding)}
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    tolerance = max(TOLERANCE, NATIVE_ROUNDINGS * torch.finfo(parameter.dtype).eps)
    prober = StreamProber(model, matrices, rotation.to(parameter), tolerance, skipped=inside)
    passages = _Passages(structure, prober)

    def run() -> list[Tensor]:
        return [leaf for leaf in tree_leaves(run_model(model, batch)) if isinstance(leaf, Tensor)]

    with prober.recording(), passages.recording():
        outputs = run()
    for name, module in matrices.items():
        weight = values_of(module, "weight")
        if name not in prober.outputs and weight is not None and width in weight.shape:
            raise NoResidualStream(f"did not run {name}, which may read or write its residual stream")
    writers = []
    for name in prober.candidates():
        with prober.frozen(moving=name), passages.frozen() as moved:
            run()
        if all(torch.equal(a, b) for a, b in moved):
            continue
        prober.check_writer(name, prober.moved_along(prober.direction, moved))
        writers.append(name)
    with prober.turned(writers) as readers, passages.turned():
        turned = run()
    for actual, expected in zip(turned, outputs, strict=True):
        prober.check_result(actual, expected)
    return prober.stream(readers, writers)


class _Passages:
    """The blocks of a model, through which the stream passes."""

    def __init__(self, structure: Structure, prober: StreamProber) -> None:
        self.modules = {name: structure.blocks[name].module for name in structure.called}
        self.prober = prober
        self.calls: dict[str, list[BlockCall]] = {}
        self.outputs: dict[str, list[Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the arguments and outputs of the blocks."""

        def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
            self.calls.setdefault(name, []).append(BlockCall(*copied((args, kwargs))))
            self.outputs.setdefault(name, []).append(copied(output))

        with hooked(self.modules, after=note):
            yield

    @contextmanager
    def frozen(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Makes the blocks return what they returned; gives a list that gets what they are handed and were handed."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def freeze(name: str, call: BlockCall, before: BlockCall, output: Any) -> Any:
            width = self.prober.width
            pairs.append((hidden_state(call, width), hidden_state(before, width)))
            return output

        with self._replacing(freeze):
            yield pairs

    @contextmanager
    def turned(self) -> Iterator[None]:
        """Makes the blocks return what they returned rotated, if that is what they are handed."""
        width = self.prober.width

        def turn(name: str, call: BlockCall, before: BlockCall, output: Any) -> Any:
            hidden = hidden_state(before, width)
            wanted = with_hidden_state(before, hidden, self.prober.rotated(hidden))
            pairs = zip(_leaves(call), _leaves(wanted), strict=True)
            if not all(self.prober.same(actual, expected) for actual, expected in pairs):
                raise NoResidualStream(f"hands {name} something else than its residual stream")
            return tree_map(lambda leaf: self.prober.rotated(leaf) if _is_stream(leaf, hidden) else leaf, output)

        with self._replacing(turn):
            yield

    @contextmanager
    def _replacing(self, replace: Callable[[str, BlockCall, BlockCall, Any], Any]) -> Iterator[None]:
        counts: dict[str, int] = {}

        def after(name: str, args: Any, kwargs: Any, _output: Any) -> Any:
            index = counts[name] = counts.get(name, -1) + 1
            if index >= len(self.calls[name]):
                raise NoResidualStream(f"calls {name} in one run and not in another")
            return replace(name, BlockCall(args, kwargs), self.calls[name][index], copied(self.outputs[name][index]))

        with hooked(self.modules, after=after):
            yield


def _is_stream(leaf: Any, hidden: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == hidden.shape


def _leaves(call: BlockCall) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
