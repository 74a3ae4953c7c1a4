"""Finds the structure of a model once: its decoder blocks, the modules in each, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Batch, BlockCall, capture_calls, find_blocks, probe_batch, run_model
from .consumers import find_consumers
from .experts import ExpertsLayout
from .hooks import hooked
from .linears import Linear, find_experts, find_linears
from .trying import Failed, attempt
from .usage import stand_ins
from .values import tensors_in

# By so many rows or values of what a model returns the layer that computed them is recognized. Fewer than the last of
# values may agree by chance.
ROWS, SAMPLED, FEWEST = 4, 64, 16


@dataclass(frozen=True)
class Block:
    """One decoder block. Names are model-wide (``model.layers.0.mlp.up_proj``) or local (``mlp.up_proj``).

    Attributes:
        name: its name in the model; empty where the model itself is the block.
        module: the module.
        linears: local names of its linear layers.
        consumers: local names of the modules that multiply hidden states by a matrix: linear layers, routers, experts.
        experts: by local name, how the experts of mixtures lie in their modules' parameters, where that is known.
        call: its first call on the probe batch; ``None`` if it was not called.
    """

    name: str
    module: nn.Module
    linears: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    experts: Mapping[str, ExpertsLayout] = field(default_factory=dict)
    call: BlockCall | None = None

    def full_name(self, local: str) -> str:
        """The model-wide name of the module that the block knows as ``local``."""
        return f"{self.name}.{local}" if self.name else local

    def local_name(self, name: str) -> str:
        """The block's name of the module that the model knows as ``name``."""
        return name.removeprefix(f"{self.name}.") if self.name else name

    def holds(self, name: str) -> bool:
        """Whether the module that the model knows as ``name`` is in the block."""
        return not self.name or name.startswith(f"{self.name}.")

    def find(self, name: str, root: nn.Module | None = None) -> nn.Module:
        """The module that the model knows as ``name``, or its counterpart in ``root``, a copy of the block."""
        return (root or self.module).get_submodule(self.local_name(name))


@dataclass(frozen=True)
class Structure:
    """The structure of a model.

    Attributes:
        model: the model.
        linears: all linear layers, by name.
        experts: how the experts of each mixture lie in their module's parameters, by the module's name; ``None`` where
            they compute something other than ``down(act(gate(x)) * up(x))``.
        blocks: the decoder blocks by name, in the order of registration.
        called: names of the blocks that the probe batch ran, in running order.
        tied: names of modules whose parameters are used under more than one name.
        misused: linear layers and experts that no other module can take the place of, by name, with the reason.
        batch: what the model was run with.
        answers: names of linear layers outside of all blocks whose output is, as it is, among what the model returns:
            the output embedding, the head of a classifier.
    """

    model: nn.Module
    linears: Mapping[str, Linear]
    experts: Mapping[str, ExpertsLayout | None]
    blocks: Mapping[str, Block]
    called: tuple[str, ...]
    tied: frozenset[str]
    misused: Mapping[str, str] = field(default_factory=dict)
    batch: Batch = field(default_factory=dict)
    answers: frozenset[str] = frozenset()

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The blocks' modules by name."""
        return {name: block.module for name, block in self.blocks.items()}


def find_structure(model: nn.Module, batch: Batch) -> Structure:
    """Finds the structure of a model, and runs it once on the first few tokens of a batch.

    Args:
        model: a model in floating point; left as it is.
        batch: token ids [B, T], or the keyword arguments of ``forward``.

    Raises:
        SmoothQuantError: the model fails on the batch.
    """
    linears, experts = find_linears(model), find_experts(model)
    modules = find_blocks(model)
    replaceable = {name: model.get_submodule(name) for name in (*linears, *experts)}
    calls, misused, probed = _watch(model, modules, replaceable, batch) if replaceable else ({}, {}, batch)
    layouts = {name: layout for name, layout in experts.items() if layout is not None}
    blocks = {name: _examine(name, module, layouts, calls.get(name)) for name, module in modules.items()}
    outside = {
        name: layer for name, layer in linears.items() if not any(block.holds(name) for block in blocks.values())
    }
    tied, answers = frozenset(tied_modules(model)), find_answers(model, outside, probed)
    return Structure(model, linears, experts, blocks, tuple(calls), tied, misused, probed, answers)


def find_answers(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> frozenset[str]:
    """The names of those layers whose output a model returns, or a selection of it, such as the last token's."""
    outputs: dict[str, list[Tensor]] = {}

    def note(name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs.setdefault(name, []).extend(tensors_in(output))

    def run() -> list[Tensor]:
        with hooked(layers, after=note):
            return tensors_in(run_model(model, batch))

    returned = attempt(run, model) if layers else []
    if isinstance(returned, Failed):
        return frozenset()
    floats = [tensor for tensor in returned if tensor.is_floating_point() and tensor.dim() and tensor.numel()]

    def is_answer(output: Tensor) -> bool:
        return any(_is_selection(tensor, output.to(tensor.device)) for tensor in floats)

    return frozenset(name for name, tensors in outputs.items() if any(map(is_answer, tensors)))


def _is_selection(tensor: Tensor, output: Tensor) -> bool:
    """Whether a tensor [..., C] has rows of an output [..., C], or as one of its channels many of its values."""
    if tensor.shape[-1] == output.shape[-1]:
        rows, choice = tensor.reshape(-1, tensor.shape[-1])[:ROWS], output.reshape(-1, output.shape[-1])
        return bool((rows[:, None] == choice).all(-1).any(1).all())
    values = tensor.flatten()[:SAMPLED]
    return len(values) >= FEWEST and bool(torch.isin(values, output).all())


def _watch(
    model: nn.Module, blocks: Mapping[str, nn.Module], replaceable: Mapping[str, nn.Module], batch: Batch
) -> tuple[dict[str, BlockCall], dict[str, str], Batch]:
    """The calls of the blocks, the uses of ``replaceable`` that forbid to replace them, and the batch that was run.

    The first few tokens may be too few for the model, or a stand-in may be what it does not expect: then the whole
    batch is taken, or no stand-in, and nothing is known of such uses.
    """

    def watch(few: Batch, places: Mapping[str, nn.Module]) -> tuple[dict[str, BlockCall], dict[str, str]]:
        with stand_ins(model, places) as uses:
            return capture_calls(model, blocks, few), uses

    short = probe_batch(batch)
    for few, places in ((short, replaceable), (batch, replaceable), (short, {}), (batch, {})):
        outcome = attempt(partial(watch, few, places), model)
        if not isinstance(outcome, Failed):
            return *outcome, few
    assert isinstance(outcome, Failed)
    raise outcome.error


def tied_modules(model: nn.Module) -> set[str]:
    """Names of modules whose parameters are used under more than one name: folding into one would change another."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _examine(name: str, module: nn.Module, layouts: Mapping[str, ExpertsLayout], call: BlockCall | None) -> Block:
    outline = Block(name, module)
    experts = {outline.local_name(each): layout for each, layout in layouts.items() if outline.holds(each)}
    # A block that is a linear layer itself has no name for it: it is converted as layers outside of all blocks are.
    linears = tuple(local for local in find_linears(module) if local)
    consumers = tuple(local for local in find_consumers(module, experts) if local)
    return Block(name, module, linears, consumers, experts, call)
