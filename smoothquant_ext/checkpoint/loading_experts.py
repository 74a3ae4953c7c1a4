"""Experts of a mixture on their way from a checkpoint, where each is stored by itself, into ``W8A8Experts``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SmoothQuantError
from ..nn.experts import NAMES, PARTS, W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.experts import ExpertsLayout, looks_like_experts, match_layouts
from ..probing.linears import values_of
from .hf_names import ExpertRenaming, expert_key, expert_names, renamed_alone
from .reading import COPY_AGAIN, StoredCheckpoint, StoredLayer


class LoadingExperts(nn.Module):
    """Stands where the experts will be while transformers fills the layers of each from the files.

    Attributes:
        reading: of the experts that it will be.
        names: what the layers are called in checkpoints of this model.
    """

    def __init__(
        self, layers: Mapping[tuple[int, str], W8A8Linear], reading: ExpertsLayout, names: dict[str, str]
    ) -> None:
        super().__init__()
        self.reading, self.names = reading, names
        for (expert, part), layer in layers.items():
            if f"expert_{expert}" not in self._modules:
                self.add_module(f"expert_{expert}", nn.Module())
            self.get_submodule(f"expert_{expert}").add_module(part, layer)

    def finished(self) -> W8A8Experts:
        """The experts of the filled layers, whose own weights are freed."""
        experts = list(self.children())
        layers: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        schemes = []
        for part in [part for part in PARTS if part in experts[0]._modules]:
            own = [cast(W8A8Linear, expert.get_submodule(part)) for expert in experts]
            schemes.append(own[0].scheme)
            stacked: list[Tensor | None] = []
            for kind in ("weight", "weight_scale", "bias"):
                values = [values_of(layer, kind) for layer in own]
                if any(value is not None and value.is_meta for value in values):
                    raise SmoothQuantError("experts in 8 bits cannot be offloaded; load the model without offloading")
                stacked.append(None if values[0] is None else torch.stack([v for v in values if v is not None]))
                for layer in own:
                    layer._buffers[kind] = None
            weight, scale, bias = stacked
            assert weight is not None
            assert scale is not None
            layers[part] = weight, scale, bias
        made = W8A8Experts(layers, self.reading.activation, schemes[0], self.reading.is_sorted)
        made.names = self.names
        return made


@dataclass
class StoredExperts:
    """The quantized experts that a checkpoint holds, for a model that fuses them.

    Attributes:
        paths: name in the files -> module of the model, number of the expert and its layer's name there.
        readings: how the module would be read.
        names: what its ``gate``, ``up`` and ``down`` are called in these files.
    """

    paths: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    readings: dict[str, ExpertsLayout] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)

    def renaming(self) -> ExpertRenaming:
        """From the names in the files to those of ``LoadingExperts``."""
        return ExpertRenaming(
            {(path, name): part for path, names in self.names.items() for part, name in names.items()}
        )


def find_stored_experts(model: PreTrainedModel, checkpoint: StoredCheckpoint, names: list[str]) -> StoredExperts:
    """Which of the stored layers ``names`` are experts of modules that hold all experts, on the meta device.

    Raises:
        SmoothQuantError: such a module computes something that ``W8A8Experts`` does not.
    """
    found = StoredExperts()
    modules = {name: module for name, module in model.named_modules() if looks_like_experts(module)}
    if not modules:
        return found
    for name, renamed in renamed_alone(model, [f"{name}.weight" for name in names]).items():
        key = expert_key(renamed)
        if key is not None and key.path in modules:
            found.paths[name.removesuffix(".weight")] = key.path, key.expert, key.layer
    for path, reading in match_layouts({path: modules[path] for path, _, _ in found.paths.values()}).items():
        if reading is None:
            kind = type(modules[path]).__name__
            raise SmoothQuantError(
                f"{checkpoint.directory}: the experts {path} are quantized, but {kind} computes "
                "something other than down(act(gate(x)) * up(x)), which is not supported"
            )
        found.readings[path] = reading
        # llm-compressor calls them gate_proj, up_proj and down_proj in every model since it unfuses them.
        stored = {layer for own, _, layer in found.paths.values() if own == path}
        own_names = expert_names(model, path, reading)
        found.names[path] = {part: NAMES[part] for part in own_names} if stored & set(NAMES.values()) else own_names
    return found


def swap_experts_(
    model: PreTrainedModel,
    checkpoint: StoredCheckpoint,
    experts: StoredExperts,
    make_layer: Callable[[StoredLayer, torch.dtype], W8A8Linear],
) -> None:
    """Puts ``LoadingExperts`` in the places of fused experts that are quantized in the checkpoint.

    Raises:
        SmoothQuantError: an expert is missing, or does not fit the configuration or the others.
    """
    by_place: dict[str, dict[tuple[int, str], str]] = {path: {} for path in experts.readings}
    for name, (path, expert, layer) in experts.paths.items():
        by_place[path][expert, layer] = name
    has_static = False
    for path, reading in experts.readings.items():
        names = experts.names[path]
        parameters = dict(model.get_submodule(path).named_parameters(recurse=False))
        layers: dict[tuple[int, str], W8A8Linear] = {}
        schemes = set()
        for part, place in reading.parts.items():
            weight, bias = place.weight(parameters), place.bias_of(parameters)
            for expert in range(len(weight)):
                if (expert, names[part]) not in by_place[path]:
                    where = f"{path}.{expert}.{names[part]}"
                    raise SmoothQuantError(f"{checkpoint.directory} lacks {where}, though other experts are there")
                name = by_place[path].pop((expert, names[part]))
                stored = checkpoint.layers[name]
                if [stored.out_features, stored.in_features] != list(weight.shape[1:]):
                    raise SmoothQuantError(
                        f"{checkpoint.directory}: {name}.weight is {[stored.out_features, stored.in_features]}, but "
                        f"config.json makes it {list(weight.shape[1:])}; {COPY_AGAIN}"
                    )
                if (bias is not None) != stored.bias or stored.smooth:
                    what = "an explicit smoothing scale" if stored.smooth else "a bias" if stored.bias else "no bias"
                    raise SmoothQuantError(f"{checkpoint.directory}: {name} has {what}, which does not fit its model")
                has_static |= stored.scheme.is_static or not stored.scheme.symmetric
                schemes.add(stored.scheme.per_token)
                layers[expert, part] = make_layer(stored, weight.dtype)
        if by_place[path]:
            raise SmoothQuantError(
                f"{checkpoint.directory}: {min(by_place[path].values())} is no layer of an expert that config.json "
                f"makes; {COPY_AGAIN}"
            )
        if len(schemes) > 1:
            kinds = " and ".join(sorted(scheme.name for scheme in schemes))
            raise SmoothQuantError(f"{checkpoint.directory}: the experts {path} are quantized as {kinds}, expected one")
        own_names = expert_names(model, path, reading)  # in what is written of it
        model.set_submodule(path, LoadingExperts(dict(sorted(layers.items())), reading, own_names))
    if has_static:
        warnings.warn(
            f"{checkpoint.directory}: the inputs of experts get a scale per token, symmetric, which is more exact than "
            "what is stored",
            stacklevel=2,
        )


def finish_experts_(model: nn.Module) -> None:
    """Replaces ``LoadingExperts`` that are filled by ``W8A8Experts``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoadingExperts):
            model.set_submodule(path, module.finished())
