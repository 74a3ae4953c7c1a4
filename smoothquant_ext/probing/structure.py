"""Finds the structure of a model once: its decoder blocks, the modules in each, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from .blocks import Batch, BlockCall, capture_calls, find_blocks, probe_batch
from .consumers import find_consumers
from .experts import ExpertsLayout
from .linears import Linear, find_experts, find_linears
from .trying import Failed, attempt
from .usage import stand_ins


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
    """

    model: nn.Module
    linears: Mapping[str, Linear]
    experts: Mapping[str, ExpertsLayout | None]
    blocks: Mapping[str, Block]
    called: tuple[str, ...]
    tied: frozenset[str]
    misused: Mapping[str, str] = field(default_factory=dict)
    batch: Batch = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The blocks' modules by name."""
        return {name: block.module for name, block in self.blocks.items()}


def find_structure(model: nn.Module, batch: Batch) -> Structure:
    """Finds the structure of a model, and runs it once on the first few tokens of a batch.

    Args:
        model: a causal LM in floating point; left as it is.
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
    return Structure(model, linears, experts, blocks, tuple(calls), frozenset(tied_modules(model)), misused, probed)


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
