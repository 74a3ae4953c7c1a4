"""Finds a causal LM's output embedding, its head, and the token embedding that it may share its weight with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..traits import embedding_of
from .blocks import run_model
from .linears import values_of
from .structure import Structure
from .trying import Failed, attempt
from .usage import stand_ins

ROWS = 64  # of the token embedding, that what it computes is seen by
EXACT = 1e-12  # relative, of numbers in fp64 that are computed by one multiplication


@dataclass(frozen=True)
class Head:
    """A model's output embedding.

    Attributes:
        name: in the model.
        embedding: the name of the token embedding that has the same weight, or ''.
        factor: what that embedding multiplies its rows by, a number in fp64.
    """

    name: str
    embedding: str = ""
    factor: float = 1.0


class NoHead(Exception):
    """A model's output embedding cannot run in 8 bits, for the reason that it is raised with."""


def find_head(structure: Structure) -> Head:
    """The output embedding of a model.

    Raises:
        NoHead: it has none that is a linear layer outside of all blocks; or it shares its weight with something else
            than a token embedding that looks rows up and multiplies them by one number; or the model does something
            else with either of them than to call it.
    """
    model = structure.model
    head, tokens = _part(model, "output"), _part(model, "input")
    name = next((name for name, linear in structure.linears.items() if linear is head), None)
    if name is None or head is None:
        raise NoHead("the model has no output embedding that is a linear layer")
    if name in structure.misused:
        raise NoHead(structure.misused[name])
    if any(block.holds(name) for block in structure.blocks.values()):
        raise NoHead("it is a part of a block")
    weight = values_of(head, "weight")
    owners = {
        owner.rpartition(".")[0]
        for owner, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is head._parameters.get("weight")
    } - {name}
    if not owners:
        return Head(name)
    embedding = next((path for path, module in model.named_modules() if module is tokens), "")
    if owners != {embedding} or not isinstance(tokens, nn.Embedding) or weight is None:
        raise NoHead(f"it shares its weight with {', '.join(sorted(owners))}")
    _check_uses(structure, {name: head, embedding: tokens})
    return Head(name, embedding, _factor(tokens))


def _check_uses(structure: Structure, modules: Mapping[str, nn.Module]) -> None:
    """Refuses modules of one weight that the model reads, or asks for its dtype or device, which change then."""

    def run() -> dict[str, str]:
        with stand_ins(structure.model, modules, harmless=frozenset()) as uses:
            run_model(structure.model, structure.batch)
        return uses

    outcome = attempt(run, structure.model)
    uses = {"": f"the model fails with stand-ins ({outcome.reason})"} if isinstance(outcome, Failed) else outcome
    for name, reason in uses.items():
        raise NoHead(f"{name}: {reason}" if name else reason)


def _part(model: nn.Module, kind: str) -> nn.Module | None:
    outcome = attempt(lambda: embedding_of(model, kind), model)
    return outcome if isinstance(outcome, nn.Module) else None


def _factor(embedding: nn.Embedding) -> float:
    """What an embedding multiplies the rows of its weight by.

    Raises:
        NoHead: it computes something else, or does that in another order.
    """
    wide = torch.linspace(1, 2, ROWS * embedding.embedding_dim, dtype=torch.float64).view(ROWS, -1)
    ratios = _looked_up(embedding, wide.to(embedding.weight.device)) / wide.to(embedding.weight.device)
    factor = float(ratios.flatten()[0])
    native = embedding.weight.detach()[:ROWS]
    if (
        not bool((ratios - factor).abs().max() <= EXACT * abs(factor))
        or factor == 0
        or not torch.equal(_looked_up(embedding, native), native * torch.tensor(factor).to(native))
    ):
        raise NoHead("the token embedding, which has the same weight, does more than to look it up")
    return factor


def _looked_up(embedding: nn.Embedding, rows: Tensor) -> Tensor:
    """What an embedding returns for each of its rows, if these were ``rows``."""
    other = copy.copy(embedding)
    other._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
    other._buffers = dict(embedding._buffers)
    other.num_embeddings, other.padding_idx = len(rows), None
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, which are the original's
        vars(other).pop(name, None)
    with torch.no_grad():
        outcome = attempt(lambda: other(torch.arange(len(rows), device=rows.device)))
    if isinstance(outcome, Failed) or not isinstance(outcome, Tensor) or outcome.shape != rows.shape:
        raise NoHead("the token embedding, which has the same weight, is not called with token ids alone")
    return outcome
