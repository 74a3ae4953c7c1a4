"""The runs of a module by which its residual stream is found: recorded, with fixed outputs, rotated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .copies import copy_of
from .hooks import hooked
from .linears import values_of
from .norms import looks_like_norm, norm_offset
from .numerics import relative_error


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


class StreamProber:
    """Runs a module with the outputs of its matrices and norms recorded, held fixed, or rotated.

    Attributes:
        rotation: [D, D], in the dtype of the module.
        direction: [D], noise.
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
        plain = {name: copy_of(each) for name, each in self.modules.items() if not list(each.children())}

        def note(name: str, args: Any, _kwargs: Any, output: Any) -> None:
            if name not in self.matrices and name not in self.norms:
                if not (looks_like_norm(self.modules[name], args, output) and output.shape[-1] == self.width):
                    return
                offset = norm_offset(plain[name], *args)
                if offset is None:
                    return
                self.norms[name] = offset
            if args and isinstance(args[0], Tensor):
                self.inputs.setdefault(name, []).append(copied(args[0]))
                self.outputs.setdefault(name, []).append(copied(output))

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
            result = copied(self.outputs[name][call - 1])
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
            return self.inputs[name][call - 1], copied(self.outputs[name][call - 1])

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
        module: nn.Module = copy_of(self.modules[norm])
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.fill_(1.0 - self.norms[norm] if name == "weight" else 0.0)
        return module

    def _shift(self, norm: str) -> Tensor:
        """A norm's bias over its weight: what is added once the weight is folded into the readers."""
        bias = values_of(self.modules[norm], "bias")
        gain = self._gain(norm)
        return torch.zeros_like(gain) if bias is None else bias / gain


def copied(value: Any) -> Any:
    """Copies of all tensors in a nest of containers."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)
