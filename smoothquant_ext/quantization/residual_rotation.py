"""R1: rotates the residual stream of a model (see ``rotation``)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..hadamard import rotation
from ..probing.blocks import Batch, run_model
from ..probing.consumers import columns_of
from ..probing.copies import copy_of, raised_
from ..probing.experts import ExpertsLayout
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.numerics import relative_error
from ..probing.residual import find_block_stream, find_outer_stream, hidden_state, stream_width, with_hidden_state
from ..probing.stream_prober import NoResidualStream, ResidualStream
from ..probing.structure import Block, Structure
from ..probing.trying import Failed, attempt
from .report import Rotations
from .smoothing import PROOF_TOLERANCE

WHOLE_TOLERANCE, WHOLE_ROUNDINGS = 1e-3, 32  # of a whole model's logits, in fp32 and of 16 bits
CHANGES = "computes something else when it is rotated"


class ResidualRotator:
    """Finds the residual stream, block by block, and rotates it in all of them or in none.

    Attributes:
        refused: why it is left as it is, or ''.
    """

    def __init__(self, structure: Structure, blocks: Mapping[str, Block]) -> None:
        self.structure, self.blocks = structure, blocks
        self.streams: dict[str, ResidualStream] = {}
        self.refused = ""
        self.turn: Tensor | None = None
        idle = [name for name in structure.blocks if name not in structure.called]
        if idle:
            self.refused = f"{idle[0]} did not run, and may share the residual stream"

    def examine(self, name: str, seed: int) -> None:
        """Finds the stream of a block. The first decides which rotation the norms allow."""
        block = self.blocks[name]
        try:
            if self.turn is None:
                assert block.call is not None
                width = stream_width(block.call)
                self.turn = rotation(width, seed)
                try:
                    _proven_stream(block, self.turn)
                except NoResidualStream:
                    self.turn = rotation(width, seed, fixes_ones=True)
            self.streams[name] = _proven_stream(block, self.turn)
        except NoResidualStream as reason:
            self.refused = f"{name} {reason}"

    def rotate_(self, probe: Batch, result: Rotations) -> None:
        """Rotates the stream everywhere, if every block was examined with success."""
        if not self.refused and self.turn is not None:
            model = self.structure.model
            try:
                outer = _found(attempt(partial(find_outer_stream, self.structure, probe, self.turn), model))
                self._rotate_(outer, probe, self.turn)
                result.untied = _untie_(model, self.structure.tied & {*outer.readers, *outer.writers})
                result.residual = True
            except NoResidualStream as reason:
                self.refused = f"the model {reason}"
        result.refused = self.refused

    def _rotate_(self, outer: ResidualStream, probe: Batch, turn: Tensor) -> None:
        model = self.structure.model
        named = {
            self.structure.blocks[n].full_name(local) for n, stream in self.streams.items() for local in stream.members
        }
        if shared := self.structure.tied & named:
            raise NoResidualStream(f"uses the weight of {min(shared)} in another place too")
        owners = list(model.modules())
        originals = [(owner, dict(owner._parameters)) for owner in owners]
        before = _logits(model, probe)
        for name, stream in self.streams.items():
            _install_(model.get_submodule(name), stream, self.structure.blocks[name].experts, turn)
        _install_(model, outer, {}, turn)
        error = relative_error(_logits(model, probe), before)
        if error > max(WHOLE_TOLERANCE, WHOLE_ROUNDINGS * torch.finfo(before.dtype).eps):
            for owner, parameters in originals:
                owner._parameters.update(parameters)
            raise NoResidualStream(f"{CHANGES} (by {error:.1e}, relative)")


def _found(outcome: ResidualStream | Failed) -> ResidualStream:
    """The result of a trial.

    Raises:
        NoResidualStream: it failed; with the reason that was found, whatever it was wrapped in, or with the exception.
    """
    if not isinstance(outcome, Failed):
        return outcome
    error: BaseException | None = outcome.error
    while error is not None:
        if isinstance(error, NoResidualStream):
            raise error
        error = error.__cause__
    raise NoResidualStream(f"fails when its residual stream is looked for ({outcome.reason})")


def _proven_stream(block: Block, turn: Tensor) -> ResidualStream:
    """The stream of a block, which was rotated in a copy of higher precision that then computed the same.

    Raises:
        NoResidualStream: there is none, or the copy did not.
    """
    native = next(parameter.dtype for parameter in block.module.parameters() if parameter.is_floating_point())
    if native == torch.float32:
        outcome = attempt(partial(_stream_in, torch.float64, block, turn))
        if not isinstance(outcome, Failed) or isinstance(outcome.error, NoResidualStream):
            return _found(outcome)  # else a kernel (grouped products of experts) may have no fp64
    return _found(attempt(partial(_stream_in, torch.float32, block, turn)))


def _stream_in(dtype: torch.dtype, block: Block, turn: Tensor) -> ResidualStream:
    call, module = block.call, raised_(copy_of(block.module), dtype)
    assert call is not None
    stream = find_block_stream(block, module, turn)
    hidden = hidden_state(call, stream.width)
    expected = call.replay(module, dtype)
    _fold_(module.get_submodule, stream, block.experts, turn)
    turned = with_hidden_state(call, hidden, hidden.to(dtype) @ turn.to(hidden.device, dtype))
    for actual, other in zip(turned.replay(module, dtype), expected, strict=True):
        wanted = other @ turn.to(other) if other.shape == hidden.shape and other.is_floating_point() else other
        if (error := relative_error(actual, wanted)) > PROOF_TOLERANCE:
            raise NoResidualStream(f"{CHANGES} (by {error:.1e}, relative)")
    return stream


def _logits(model: nn.Module, probe: Batch) -> Tensor:
    """The largest floating-point tensor that the model returns."""
    leaves = [leaf for leaf in tree_leaves(run_model(model, probe)) if isinstance(leaf, Tensor)]
    return max((leaf for leaf in leaves if leaf.is_floating_point()), key=torch.numel)


def _untie_(model: nn.Module, tied: Collection[str]) -> int:
    """Says in the configuration that no weights are shared any more; the bytes of those that were."""
    if not tied:
        return 0
    config: Any = getattr(model, "config", None)
    configs: list[Any] = [config, getattr(config, "get_text_config", lambda: None)()]
    for each in configs:
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
    weights = [values_of(model.get_submodule(name), "weight") for name in tied]
    return min(weight.nbytes for weight in weights if weight is not None)


def _install_(root: nn.Module, stream: ResidualStream, layouts: Mapping[str, ExpertsLayout], turn: Tensor) -> None:
    """Gives the members of a stream new parameters, rotated; the old ones stay whole."""
    copies = {name: copy_of(root.get_submodule(name)) for name in stream.members}
    _fold_(copies.__getitem__, stream, layouts, turn)
    for name, other in copies.items():
        root.get_submodule(name)._parameters.update(other._parameters)


def _fold_(
    find: Callable[[str], nn.Module], stream: ResidualStream, layouts: Mapping[str, ExpertsLayout], turn: Tensor
) -> None:
    """Rotates the members of a stream in place."""
    gains = {norm: wide(values_of(find(norm), "weight")) + offset for norm, offset in stream.norms.items()}
    for name, norm in stream.readers.items():
        for columns in columns_of(find(name), layouts.get(name)):
            scaled = wide(columns) if norm is None else wide(columns) * gains[norm]
            columns.copy_(scaled @ turn.to(scaled))
    for name in stream.writers:
        for rows, bias in _rows_of(find(name), layouts.get(name)):
            rows.copy_(turn.t().to(wide(rows)) @ wide(rows))
            if bias is not None:
                bias.copy_(wide(bias) @ turn.to(wide(bias)))
    for norm, offset in stream.norms.items():
        weight, bias = values_of(find(norm), "weight"), values_of(find(norm), "bias")
        assert weight is not None
        weight.fill_(1.0 - offset)
        if bias is not None:
            shift = wide(bias) / gains[norm]
            bias.copy_(shift @ turn.to(shift))


def _rows_of(module: nn.Module, layout: ExpertsLayout | None) -> list[tuple[Tensor, Tensor | None]]:
    """The weights [N, K] whose rows make the channels of a module's output, with their biases [N]: views."""
    if layout is not None:
        parameters = dict(module.named_parameters(recurse=False))
        weights, biases = layout.down.weight(parameters), layout.down.bias_of(parameters)
        return [(weight, None if biases is None else biases[i]) for i, weight in enumerate(weights)]
    weight = weight_nk(as_linear(module)) if is_linear(module) else values_of(module, "weight")
    assert weight is not None
    return [(weight if is_linear(module) else weight.t(), values_of(module, "bias"))]  # an embedding has [V, D]


def wide(tensor: Tensor | None) -> Tensor:
    """At least fp32, fp64 where it is fp32 already: a rotation is rounded once, to the dtype of the weight."""
    assert tensor is not None
    return (
        tensor.double()
        if tensor.dtype == torch.float32
        else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    )
