"""Selects the linear layers and experts that a recipe quantizes, with the reasons for leaving out the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..checkpoint.hf_names import is_kept_in_fp32
from ..errors import SmoothQuantError
from ..nn.linear import W8A8Linear
from ..probing.experts import ExpertsLayout
from ..probing.linears import Linear, values_of, weight_nk
from ..probing.structure import Structure
from ..traits import embedding_of
from .recipe import Recipe

OUTPUT_EMBEDDING = "output embedding"  # a reason; ``head`` may decide otherwise
# Configuration keys that hold the number of experts; a linear with that many outputs chooses among them.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass
class Selection:
    """Which linear layers and experts will run in 8 bits, and why the others will not.

    Attributes:
        linears: the layers to quantize, by name.
        experts: the layouts of the experts of mixtures to quantize, by the name of the module that holds them all.
        skipped: the reason for each layer left in floating point, by name.
    """

    linears: dict[str, Linear] = field(default_factory=dict)
    experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the layers and experts to quantize."""
        return [*self.linears, *self.experts]

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers and the modules of experts to quantize, by name."""
        return {name: model.get_submodule(name) for name in self.names}

    def skip(self, name: str, reason: str) -> None:
        """Leaves a layer, or the experts of a mixture, in floating point."""
        self.linears.pop(name, None)
        self.experts.pop(name, None)
        self.skipped[name] = reason


def select_linears(structure: Structure, recipe: Recipe) -> Selection:
    """Applies a recipe's patterns and the defaults (output embedding, routers and gates stay in floating point).

    Patterns are shell globs matched against the whole module name or any run of whole name parts
    (``down_proj``, ``layers.0.*``, ``*.self_attn.*``).

    Raises:
        SmoothQuantError: a pattern matches nothing, or nothing is left to quantize.
    """
    model, linears, experts = structure.model, structure.linears, structure.experts
    for option, patterns in (("skip", recipe.skip), ("only", recipe.only)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in (*linears, *experts)):
                raise SmoothQuantError(
                    f"--{option} pattern {pattern!r} matches no linear layer; names look like {_examples(linears)}"
                )
    reasons = dict.fromkeys(structure.answers, "computes what the model returns") | _default_skips(model, linears)
    misused = {name: f"{reason}, so nothing can take its place" for name, reason in structure.misused.items()}
    reasons = misused | reasons
    selection = Selection(skipped=_unsupported_weights(model, {*linears, *experts}))
    for name in (*linears, *experts):
        layout = experts.get(name)
        if any(_matches(name, pattern) for pattern in recipe.skip):
            selection.skipped[name] = "skipped by pattern"
        elif recipe.only and not any(_matches(name, pattern) for pattern in recipe.only):
            selection.skipped[name] = "not among the patterns of --only"
        elif name in reasons:
            selection.skipped[name] = reasons[name]
        elif name in linears:
            selection.linears[name] = linears[name]
        elif layout is not None:
            selection.experts[name] = layout
        else:
            selection.skipped[name] = "experts that compute something other than down(act(gate(x)) * up(x))"
    if not selection.names:
        if any(isinstance(module, W8A8Linear) for module in model.modules()):
            raise SmoothQuantError(f"{type(model).__name__} is in 8 bits already; take the model that it was made of")
        kinds = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        left_out = "".join(f"; {name}: {reason}" for name, reason in list(selection.skipped.items())[:1])
        raise SmoothQuantError(
            f"{type(model).__name__} has no linear layer to quantize"
            + (f": all {len(linears)} are left out{left_out}" if linears else f"; its leaf modules are {kinds}")
        )
    return selection


def check_finite_weights(modules: Mapping[str, nn.Module]) -> None:
    """Raises SmoothQuantError naming the first module whose weights or biases hold a NaN or an infinity."""
    for name, module in modules.items():
        for kind, tensor in module.named_parameters(recurse=False):
            if not torch.isfinite(tensor.detach().sum(dtype=torch.float64)):
                bad = int((~torch.isfinite(tensor.detach())).sum())
                raise SmoothQuantError(
                    f"{name}.{kind} holds {bad} non-finite values of {tensor.numel()}; the model is damaged, "
                    f"or leave the layer out with --skip {name!r}"
                )


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(run, pattern) for run in runs)


def _examples(linears: Mapping[str, Linear]) -> str:
    names = list(linears)
    return ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1]))) if names else "nothing here"


def _unsupported_weights(model: nn.Module, known: set[str]) -> dict[str, str]:
    """Modules that have weights and are no linear layers, so that none is left out silently: with weights of more
    dimensions (convolutions), or with a matrix and another forward than a linear layer's (routers).
    """
    reasons = {}
    for name, module in model.named_modules():
        if name in known or isinstance(module, nn.Embedding):
            continue
        weight = values_of(module, "weight")
        is_matrix = weight is not None and weight.dim() == 2
        if is_matrix or any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            what = "computes something else than" if isinstance(module, nn.Linear) else "is not"
            reasons[name] = f"{type(module).__name__} {what} a linear layer"
    return reasons


def _default_skips(model: nn.Module, linears: Mapping[str, Linear]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    head = embedding_of(model, "output")
    config = getattr(model, "config", None)
    find_text = getattr(config, "get_text_config", None)
    text_config = find_text() if find_text else config
    counts = {getattr(text_config, key, None) for key in EXPERT_COUNT_KEYS} - {None, 0, 1}
    for name, linear in linears.items():
        if linear is head:
            reasons[name] = OUTPUT_EMBEDDING
        elif weight_nk(linear).shape[0] in counts:
            reasons[name] = "expert router"
        elif weight_nk(linear).shape[0] == 1:
            reasons[name] = "gate of one output"
        elif is_kept_in_fp32(model, f"{name}.weight"):
            reasons[name] = "transformers keeps it in fp32"  # the code around it may cast its input to that dtype
    return reasons
