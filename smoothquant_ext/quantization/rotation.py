"""Rotates the activations of a model, so that the outliers of a few channels are spread over all.

Two rotations cost nothing at run time, because both they and their inverses are folded into weights (QuaRot, Ashkboos et
al. 2024, section 4; SpinQuant's names):

- **R1, the residual stream**: whatever is added to it is rotated, whatever reads it is rotated back. The weights of the
  norms in between are folded into the readers before, since they scale channel by channel. A norm that subtracts the mean
  commutes with rotations that leave a vector of equal elements alone.
- **R2, the heads of attention**: the values are rotated, and the projection behind the attention is rotated back. A
  rotation within a head commutes with the averages that attention takes over tokens.

Each is found by running the blocks (``probing/residual.py``, ``probing/smoothing_groups.py``), folded into a copy of the
block in a higher precision, and dropped if the block then computes something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..hadamard import rotation
from ..probing.blocks import Batch, probe_batch, run_model
from ..probing.consumers import columns_of
from ..probing.experts import ExpertsLayout
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.numerics import relative_error
from ..probing.residual import (
    NoResidualStream,
    ResidualStream,
    find_block_stream,
    find_outer_stream,
    hidden_state,
    with_hidden_state,
)
from ..probing.smoothing_groups import BlockProber, Discovery
from ..probing.structure import Block, Structure
from .report import Rotations
from .smoothing import PROOF_TOLERANCE, Proof

WHOLE_ROUNDINGS = 32  # of a whole model's logits in its own dtype
SMALLEST_HEAD = 8  # channels; a rotation of fewer spreads nothing


def rotate_(
    structure: Structure,
    batch: Batch,
    kinds: Collection[str],
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Rotations:
    """Rotates a model, whose parameters are exchanged for rotated ones; what cannot be rotated stays as it is.

    Args:
        structure: of the model in floating point.
        batch: whose first tokens show how the model is wired.
        kinds: ``"residual"``, ``"heads"``.
        seed: of the rotations.
        progress: wraps the iterable of blocks.
    """
    rotations = Rotations()
    if "residual" in kinds:
        _try_residual_(structure, probe_batch(batch), seed, progress, rotations)
    if "heads" in kinds:
        hints: dict[tuple[type, str, int], Any] = {}
        for name in progress(structure.called):
            _rotate_heads_(structure.blocks[name], structure.tied, seed + 1, hints, rotations)
    return rotations


def _try_residual_(
    structure: Structure, probe: Batch, seed: int, progress: Callable[[Iterable[Any]], Iterable[Any]], result: Rotations
) -> None:
    try:
        result.refused = "the model "
        width = _stream_width(structure)
        first = structure.called[0]
        result.refused = f"the block {first} "
        for fixes_ones in (False, True):
            turn = rotation(width, seed, fixes_ones)
            try:
                _proven_stream(structure.blocks[first], turn)
                break
            except NoResidualStream:
                if fixes_ones:
                    raise
        streams = {}
        for name in progress(structure.called):
            result.refused = f"the block {name} "
            streams[name] = _proven_stream(structure.blocks[name], turn)
        result.refused = "the model "
        outer = find_outer_stream(structure, probe, turn)
        result.untied = _rotate_residual_(structure, probe, streams, outer, turn)
        result.residual, result.refused = True, ""
    except NoResidualStream as reason:
        result.refused += str(reason)


def _stream_width(structure: Structure) -> int:
    """The last dimension of what every block is called with."""
    if not structure.called:
        raise NoResidualStream("no block runs")
    if len(structure.called) < len(structure.blocks):
        idle = next(name for name in structure.blocks if name not in structure.called)
        raise NoResidualStream(f"did not run {idle}, which may share the residual stream")
    call = structure.blocks[structure.called[0]].call
    assert call is not None
    hidden = next((leaf for leaf in tree_leaves((call.args, call.kwargs)) if _is_hidden(leaf)), None)
    if hidden is None:
        raise NoResidualStream("calls its blocks without hidden states")
    return int(hidden.shape[-1])


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() == 3


def _proven_stream(block: Block, turn: Tensor) -> ResidualStream:
    """The stream of a block, rotated in a copy that then computes the same.

    Raises:
        NoResidualStream: it does not.
    """
    assert block.call is not None
    native = next(parameter.dtype for parameter in block.module.parameters() if parameter.is_floating_point())
    for dtype in (torch.float64, torch.float32) if native == torch.float32 else (torch.float32,):
        module = copy.deepcopy(block.module).to(dtype)
        try:
            stream = find_block_stream(block, module, turn)
            hidden = hidden_state(block.call, stream.width)
            expected = block.call.replay(module, dtype)
            _fold_(module.get_submodule, stream, block.experts, turn)
            turned = with_hidden_state(block.call, hidden, hidden.to(dtype) @ turn.to(hidden.device, dtype))
            actual = turned.replay(module, dtype)
        except RuntimeError:  # some kernels (grouped products of experts) have no fp64
            if dtype == torch.float32:
                raise
            continue
        for one, other in zip(actual, expected, strict=True):
            wanted = other @ turn.to(other) if other.shape == hidden.shape and other.is_floating_point() else other
            if (error := relative_error(one, wanted)) > PROOF_TOLERANCE:
                raise NoResidualStream(f"computes something else when it is rotated (by {error:.1e}, relative)")
        return stream
    raise AssertionError


def _rotate_residual_(
    structure: Structure, probe: Batch, streams: Mapping[str, ResidualStream], outer: ResidualStream, turn: Tensor
) -> int:
    """Rotates the model; the bytes of what has to be stored apart from now on."""
    model = structure.model
    members = {structure.blocks[name].full_name(local): (name, local) for name, s in streams.items() for local in s.members}
    shared = structure.tied & members.keys()
    if shared:
        raise NoResidualStream(f"shares the weight of {min(shared)} with another module")
    parameters = {(owner, name): p for owner in model.modules() for name, p in owner._parameters.items()}
    before = _logits(model, probe)
    for name, stream in streams.items():
        block = structure.blocks[name]
        _install_(block.module, stream, block.experts, turn)
    _install_(model, outer, {}, turn)
    error = relative_error(_logits(model, probe), before)
    if error > max(1e-3, WHOLE_ROUNDINGS * torch.finfo(before.dtype).eps):
        for (owner, name), parameter in parameters.items():
            owner._parameters[name] = parameter
        raise NoResidualStream(f"computes something else when it is rotated (by {error:.1e}, relative)")
    return _untie_(model, structure.tied & {*outer.readers, *outer.writers})


def _logits(model: nn.Module, probe: Batch) -> Tensor:
    """The largest floating-point tensor that the model returns."""
    leaves = [leaf for leaf in tree_leaves(run_model(model, probe)) if isinstance(leaf, Tensor)]
    return max((leaf for leaf in leaves if leaf.is_floating_point()), key=torch.numel)


def _untie_(model: nn.Module, tied: Collection[str]) -> int:
    """Says in the configuration that no weights are shared any more; the bytes of those that were."""
    if not tied:
        return 0
    config = getattr(model, "config", None)
    for each in {id(c): c for c in (config, getattr(config, "get_text_config", lambda: None)())}.values():
        if getattr(each, "tie_word_embeddings", False):
            each.tie_word_embeddings = False
    weights = [values_of(model.get_submodule(name), "weight") for name in tied]
    return min(weight.nbytes for weight in weights if weight is not None)


def _install_(root: nn.Module, stream: ResidualStream, layouts: Mapping[str, ExpertsLayout], turn: Tensor) -> None:
    """Gives the members of a stream new parameters, rotated; the old ones stay whole."""
    copies = {name: copy.deepcopy(root.get_submodule(name)) for name in stream.members}
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
    return tensor.double() if tensor.dtype == torch.float32 else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rotate_heads_(
    block: Block, tied: Collection[str], seed: int, hints: dict[tuple[type, str, int], Any], result: Rotations
) -> None:
    """Rotates the values of a block's attention, in heads as large as the block allows."""
    discovery = Discovery()
    BlockProber(block, tied, hints).find_groups(discovery, kinds=("linear",))
    for group in discovery.groups:
        (consumer, channel_map), *more = group.consumers.items()
        if more or not is_linear(block.find(consumer)):
            continue
        proof = Proof(block)
        key = type(block.module), f"heads of {block.local_name(group.producer)}", group.channels
        sizes = [hints[key]] if key in hints else _head_sizes(channel_map)
        hints.setdefault(key, 0)
        for size in filter(None, sizes):
            heads = _heads(channel_map, size)
            turn = rotation(size, seed)
            members = group.producer, consumer

            def fold_(modules: Sequence[nn.Module], heads: Sequence[Tensor] = heads, turn: Tensor = turn) -> None:
                _fold_heads_(modules[0], modules[1], heads, turn)

            modules = [block.find(name, proof.module) for name in members]
            if not proof.attempt(modules, lambda: fold_(modules)):
                hints[key] = result.heads[block.name] = size
                copies = [copy.deepcopy(block.find(name)) for name in members]
                fold_(copies)
                for name, other in zip(members, copies, strict=True):
                    block.find(name)._parameters.update(other._parameters)
                break


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
