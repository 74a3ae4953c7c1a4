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

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .blocks import Batch, BlockCall, run_model
from .hooks import hooked
from .linears import is_linear, values_of
from .norms import looks_like_norm, norm_offset
from .numerics import relative_error
from .structure import Block, Structure

# Norms, rotary embeddings and softmax compute in fp32 whatever their input: a few dozen roundings.
TOLERANCE = 64 * torch.finfo(torch.float32).eps
# Of a whole model in its own dtype: a rotation, a norm, and what lies between them.
NATIVE_ROUNDINGS = 8


@dataclass(frozen=True)
class ResidualStream:
    """The matrices of one block at the residual stream, by their names in the block.

    Attributes:
        width: channels of the stream.
        readers: of each matrix that reads the stream the norm before it, or ``None`` where there is none.
        writers: the matrices whose outputs are added to the stream.
        norms: the offset of each of these norms' weight, see ``norm_offset``.
    """

    width: int
    readers: Mapping[str, str | None]
    writers: tuple[str, ...]
    norms: Mapping[str, float]

    @property
    def members(self) -> list[str]:
        """The names of all of them."""
        return list(dict.fromkeys((*self.readers, *self.writers, *self.norms)))


class NoResidualStream(Exception):
    """Why a block's residual stream cannot be rotated, to follow the block's name in a sentence."""


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
    hidden = hidden_state(call, len(rotation))
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())

    def run(values: Tensor) -> list[Tensor]:
        return with_hidden_state(call, hidden, values).replay(module, dtype)

    matrices = {name: module.get_submodule(name) for name in block.consumers}
    prober = _Prober(module, matrices, rotation.to(next(module.parameters())), TOLERANCE)
    with prober.recording():
        outputs = run(hidden)
    is_stream = [output.is_floating_point() and output.shape == hidden.shape for output in outputs]
    if not any(is_stream):
        raise NoResidualStream("returns no hidden states")

    def moves(direction: Tensor, moved: list[Tensor]) -> bool:
        streams = list(itertools.compress(zip(moved, outputs, strict=True), is_stream))
        others = itertools.compress(zip(moved, outputs, strict=True), [not each for each in is_stream])
        return prober.moved_along(direction, streams) and all(torch.equal(a, b) for a, b in others)

    with prober.frozen():
        if not moves(prober.direction, run(hidden.to(dtype) + prober.direction)):
            raise NoResidualStream("adds nothing to its input, or something else than the outputs of its matrices")
    writers = []
    for name in prober.candidates():
        with prober.frozen(moving=name):
            moved = run(hidden)
        if all(torch.equal(a, b) for a, b in zip(moved, outputs, strict=True)):
            continue
        prober.check_writer(name, moves(prober.direction, moved))
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
    prober = _Prober(model, matrices, rotation.to(parameter), tolerance, skipped=inside)
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


class _Prober:
    """Runs a module with the outputs of its matrices and norms recorded, held fixed, or rotated.

    Attributes:
        rotation: [D, D], in the dtype of the module.
        direction: [D], of unit length: noise.
        norms: the norms over D channels that the recorded run called, with their offsets.
        inputs: of matrices and norms, for each call.
        outputs: likewise.
    """

    def __init__(
        self,
        root: nn.Module,
        matrices: Mapping[str, nn.Module],
        rotation: Tensor,
        tolerance: float,
        skipped: tuple[str, ...] = (),
    ) -> None:
        """Prepares the runs; what is below the prefixes ``skipped`` is left alone."""
        self.rotation, self.tolerance, self.width = rotation, tolerance, len(rotation)
        self.modules = {name: module for name, module in root.named_modules() if not name.startswith(skipped or "\0")}
        self.matrices = matrices
        self.norms: dict[str, float] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Any]] = {}
        noise = torch.randn(self.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.direction = noise.to(rotation)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the inputs and outputs of matrices and norms."""
        # Copies have no hooks: a norm is run to see what it computes.
        plain = {name: copy.deepcopy(each) for name, each in self.modules.items() if not list(each.children())}

        def note(name: str, args: Any, _kwargs: Any, output: Any) -> None:
            if name not in self.matrices and name not in self.norms:
                if not (looks_like_norm(self.modules[name], args, output) and output.shape[-1] == self.width):
                    return
                offset = norm_offset(plain[name], *args)
                if offset is None:
                    return
                self.norms[name] = offset
            if args and isinstance(args[0], Tensor):
                self.inputs.setdefault(name, []).append(_copied(args[0]))
                self.outputs.setdefault(name, []).append(_copied(output))

        with hooked({name: each for name, each in self.modules.items() if name}, after=note):
            yield

    def candidates(self) -> Iterator[str]:
        """The matrices and norms whose output may be added to the stream."""
        for name, outputs in self.outputs.items():
            if isinstance(outputs[0], Tensor) and outputs[0].shape[-1] == self.width:
                yield name

    @contextmanager
    def frozen(self, moving: str | None = None) -> Iterator[None]:
        """Makes matrices and norms return what they returned, ``moving`` that plus ``direction``."""
        counts: dict[str, int] = {}

        def freeze(name: str, _args: Any, _kwargs: Any, output: Any) -> Any:
            call = counts[name] = counts.get(name, 0) + 1
            if call > len(self.outputs.get(name, ())):
                return None
            result = _copied(self.outputs[name][call - 1])
            return result + self.direction if name == moving else result

        with hooked({name: self.modules[name] for name in (*self.matrices, *self.norms)}, after=freeze):
            yield

    @contextmanager
    def turned(self, writers: Sequence[str]) -> Iterator[dict[str, str | None]]:
        """Makes writers return their recorded outputs rotated, norms theirs without a weight, others theirs.

        Gives a dictionary that gets an entry for each reader: the norm before it, or ``None``.
        """
        readers: dict[str, str | None] = {}
        turned_norms: list[str] = []
        counts: dict[str, int] = {}
        plain = {name: self._unweighted(name) for name in self.norms}

        def recorded(name: str, args: Any) -> tuple[Tensor, Any]:
            call = counts[name] = counts.get(name, 0) + 1
            if call > len(self.inputs.get(name, ())) or not args:
                raise NoResidualStream(f"calls {name} in one run and not in another")
            return self.inputs[name][call - 1], _copied(self.outputs[name][call - 1])

        def turn_norm(name: str, args: Any, _kwargs: Any, _output: Any) -> Any:
            before, result = recorded(name, args)
            if self.same(args[0], before):
                return result
            if not self.same(args[0], self.rotated(before)):
                raise NoResidualStream(f"hands {name} a part of its residual stream, or a function of it")
            wanted = self.rotated(plain[name](before))
            if not self.same(plain[name](args[0]), wanted):
                raise NoResidualStream(f"has a norm, {name}, that does not commute with rotations")
            turned_norms.append(name)
            return wanted + self.rotated(self._shift(name))

        def turn_matrix(name: str, args: Any, _kwargs: Any, _output: Any) -> Any:
            before, result = recorded(name, args)
            if not self.same(args[0], before):
                sources = [n for n in (None, *turned_norms) if self._is_reading(args[0], before, n)]
                if not sources or readers.get(name, sources[-1]) != sources[-1]:
                    raise NoResidualStream(f"hands {name} a part of its residual stream, or a function of it")
                readers[name] = sources[-1]
            elif name in readers:
                raise NoResidualStream(f"hands {name} its residual stream, and something else")
            return self.rotated(result) if name in writers else result

        norms = {name: self.modules[name] for name in self.norms}
        with hooked(norms, after=turn_norm), hooked(self.matrices, after=turn_matrix):
            yield readers

    def stream(self, readers: Mapping[str, str | None], writers: Sequence[str]) -> ResidualStream:
        """The result."""
        norms = {norm: self.norms[norm] for norm in readers.values() if norm is not None}
        return ResidualStream(self.width, dict(readers), tuple(writers), norms)

    def check_writer(self, name: str, moves_along: bool) -> None:
        """Raises NoResidualStream for something that reaches the stream and may not."""
        if not moves_along:
            raise NoResidualStream(f"adds a function of the output of {name} to its residual stream")
        if name in self.norms:
            raise NoResidualStream(f"has a norm, {name}, between a matrix and the residual stream")

    def check_result(self, actual: Tensor, expected: Tensor) -> None:
        """Raises NoResidualStream if a rotated run has another result than expected."""
        if not self.same(actual, expected):
            raise NoResidualStream("uses its residual stream in a way that does not commute with rotations")

    def moved_along(self, direction: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Whether the first of each pair is the second plus something along a direction, not zero in all of them."""
        any_moved = False
        for actual, expected in pairs:
            change = (actual - expected).reshape(-1, self.width)
            along = (change @ direction)[:, None] * direction / direction.dot(direction)
            if float((change - along).norm()) > self.tolerance * float(change.norm() + expected.norm()):
                return False
            any_moved |= bool(change.any())
        return any_moved

    def rotated(self, values: Tensor) -> Tensor:
        return values.to(self.rotation) @ self.rotation

    def same(self, actual: Tensor, expected: Tensor) -> bool:
        return actual.shape == expected.shape and relative_error(actual, expected) <= self.tolerance

    def _is_reading(self, actual: Tensor, before: Tensor, norm: str | None) -> bool:
        """Whether a matrix that was handed ``before`` is handed it rotated, less the weight of a norm."""
        if before.shape[-1] != self.width:
            return False
        return self.same(actual, self.rotated(before if norm is None else before / self._gain(norm)))

    def _gain(self, norm: str) -> Tensor:
        weight = values_of(self.modules[norm], "weight")
        assert weight is not None
        gain = weight + self.norms[norm]
        if bool((gain == 0).any()):
            raise NoResidualStream(f"has a norm, {norm}, with a weight of 0")
        return gain

    def _unweighted(self, norm: str) -> nn.Module:
        module = copy.deepcopy(self.modules[norm])
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.fill_(1.0 - self.norms[norm] if name == "weight" else 0.0)
        return module

    def _shift(self, norm: str) -> Tensor:
        """A norm's bias over its weight: what is added once the weight is folded into the readers."""
        bias = values_of(self.modules[norm], "bias")
        gain = self._gain(norm)
        return torch.zeros_like(gain) if bias is None else bias / gain


class _Passages:
    """The blocks of a model, through which the stream passes."""

    def __init__(self, structure: Structure, prober: _Prober) -> None:
        self.modules = {name: structure.blocks[name].module for name in structure.called}
        self.prober = prober
        self.calls: dict[str, list[BlockCall]] = {}
        self.outputs: dict[str, list[Any]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the arguments and outputs of the blocks."""

        def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
            self.calls.setdefault(name, []).append(BlockCall(*_copied((args, kwargs))))
            self.outputs.setdefault(name, []).append(_copied(output))

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
            return replace(name, BlockCall(args, kwargs), self.calls[name][index], _copied(self.outputs[name][index]))

        with hooked(self.modules, after=after):
            yield


def _is_stream(leaf: Any, hidden: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape == hidden.shape


def _leaves(call: BlockCall) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]


def _copied(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
