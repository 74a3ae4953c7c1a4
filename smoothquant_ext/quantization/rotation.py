"""Rotates the activations of a model, so that the outliers of a few channels are spread over all.

Two rotations cost nothing at run time, because both they and their inverses are folded into weights (QuaRot, Ashkboos
et al. 2024, section 4; SpinQuant's names):

- **R1, the residual stream**: whatever is added to it is rotated, whatever reads it is rotated back. The weights of the
  norms in between are folded into the readers before, since they scale channel by channel. A norm that subtracts the
  mean commutes with rotations that leave a vector of equal elements alone.
- **R2, the heads of attention**: the values are rotated, and the projection behind the attention is rotated back. A
  rotation within a head commutes with the averages that attention takes over tokens.

Each is found by running the blocks (``probing/residual.py``, ``probing/smoothing_groups.py``), folded into a copy of
the block in a higher precision, and dropped if the block then computes something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..hadamard import rotation
from ..probing.blocks import Batch, probe_batch, run_model
from ..probing.consumers import columns_of
from ..probing.copies import copy_of, raised_
from ..probing.experts import ExpertsLayout
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.numerics import relative_error
from ..probing.residual import find_block_stream, find_outer_stream, hidden_state, with_hidden_state
from ..probing.smoothing_groups import BlockProber, Discovery
from ..probing.stream_prober import NoResidualStream, ResidualStream
from ..probing.structure import Block, Structure
from ..probing.trying import Failed, attempt
from .placement import Placement
from .report import Rotations
from .smoothing import PROOF_TOLERANCE, Proof

WHOLE_TOLERANCE, WHOLE_ROUNDINGS = 1e-3, 32  # of a whole model's logits, in fp32 and of 16 bits
CHANGES = "computes something else when it is rotated"
SMALLEST_HEAD = 8  # channels; a rotation of fewer spreads nothing


def rotate_(
    structure: Structure,
    batch: Batch,
    kinds: Collection[str],
    placement: Placement,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    seed: int = 0,
) -> Rotations:
    """Rotates a model, whose parameters are exchanged for rotated ones; what cannot be rotated stays as it is.

    Args:
        structure: of the model in floating point.
        batch: whose first tokens show how the model is wired.
        kinds: some of ``recipe.ROTATIONS``.
        placement: where the blocks run.
        progress: wraps the iterable of blocks.
        seed: of the rotations.
    """
    result = Rotations()
    blocks = placement.blocks_of(structure).blocks
    hints: dict[tuple[type, str, int], Any] = {}
    headless: set[tuple[type, str, int]] = set()
    rotator = _ResidualRotator(structure, blocks) if "residual" in kinds else None
    for name in progress(structure.called):
        if rotator is not None and not rotator.refused:
            rotator.examine(name, seed)
        if "heads" in kinds:
            _rotate_heads_(structure, blocks[name], seed + 1, hints, headless, result)
    if rotator is not None:
        with placement.running(structure):
            rotator.rotate_(probe_batch(batch), result)
    return result


class _ResidualRotator:
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
                width = _stream_width(block)
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


def _stream_width(block: Block) -> int:
    """The last dimension of the hidden states that a block is called with."""
    assert block.call is not None
    for leaf in tree_leaves((block.call.args, block.call.kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3:
            return int(leaf.shape[-1])
    raise NoResidualStream("is called without hidden states")


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
    gains = {norm: _wide(values_of(find(norm), "weight")) + offset for norm, offset in stream.norms.items()}
    for name, norm in stream.readers.items():
        for columns in columns_of(find(name), layouts.get(name)):
            scaled = _wide(columns) if norm is None else _wide(columns) * gains[norm]
            columns.copy_(scaled @ turn.to(scaled))
    for name in stream.writers:
        for rows, bias in _rows_of(find(name), layouts.get(name)):
            rows.copy_(turn.t().to(_wide(rows)) @ _wide(rows))
            if bias is not None:
                bias.copy_(_wide(bias) @ turn.to(_wide(bias)))
    for norm, offset in stream.norms.items():
        weight, bias = values_of(find(norm), "weight"), values_of(find(norm), "bias")
        assert weight is not None
        weight.fill_(1.0 - offset)
        if bias is not None:
            shift = _wide(bias) / gains[norm]
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


def _wide(tensor: Tensor | None) -> Tensor:
    """At least fp32, fp64 where it is fp32 already: a rotation is rounded once, to the dtype of the weight."""
    assert tensor is not None
    return (
        tensor.double()
        if tensor.dtype == torch.float32
        else tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    )


def _rotate_heads_(
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
                result.heads[block.name] = size
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
    turn = turn.to(_wide(rows))
    size = len(turn)
    for index in {tuple(head.tolist()) for head in heads}:
        rows[list(index)] = (turn.t() @ _wide(rows[list(index)])).to(rows)
        if bias is not None:
            bias[list(index)] = (_wide(bias[list(index)]) @ turn).to(bias)
    for start in range(0, columns.shape[1], size):
        part = columns[:, start : start + size]
        part.copy_(_wide(part) @ turn)
