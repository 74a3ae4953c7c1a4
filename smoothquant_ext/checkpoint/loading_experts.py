"""Loads the experts of a mixture, whose layers a checkpoint stores one by one, into ``W8A8Experts``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SmoothQuantError
from ..nn.experts import NAMES, PARTS, W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.experts import ExpertsLayout, looks_like_experts, match_layouts
from ..probing.linears import values_of
from .formats.base import CONVERT_AGAIN
from .hf_names import ExpertRenaming, expert_key, expert_names, renamed_alone
from .reading import COPY_AGAIN, Checkpoint, CheckpointLayer


class LoadingExperts(nn.Module):
    """Takes the place of a module of experts while transformers fills the layers of each expert from the files.

    Attributes:
        reading: how the weights of the module are arranged.
        names: the names of an expert's layers in checkpoints of this model, by part.
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
        """The module of 8-bit experts, made of the filled layers, whose weights are freed."""
        experts = list(self.children())
        layers: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        schemes, rotate = [], [0, 0]
        for part in [part for part in PARTS if part in experts[0]._modules]:
            layers_of_part = [cast(W8A8Linear, expert.get_submodule(part)) for expert in experts]
            schemes.append(layers_of_part[0].scheme)
            rotate[part == "down"] = layers_of_part[0].rotate  # all of them have the same
            stacked: list[Tensor | None] = []
            for kind in ("weight", "weight_scale", "bias"):
                values = [values_of(layer, kind) for layer in layers_of_part]
                if any(value is not None and value.is_meta for value in values):
                    raise SmoothQuantError("experts in 8 bits cannot be offloaded; load the model without offloading")
                stacked.append(None if values[0] is None else torch.stack([v for v in values if v is not None]))
                for layer in layers_of_part:
                    layer._buffers[kind] = None
            weight, scale, bias = stacked
            assert weight is not None
            assert scale is not None
            layers[part] = weight, scale, bias
        made = W8A8Experts(layers, self.reading.activation, schemes[0], self.reading.is_sorted)
        made.names, made.rotate = self.names, (rotate[0], rotate[1])
        return made


@dataclass
class CheckpointExperts:
    """The quantized experts of a checkpoint whose model holds all experts in one module.

    Attributes:
        paths: the path of the module, the number of the expert and the name of its layer in the files, by the name of
            the layer.
        readings: how the weights of a module are arranged, by its path.
        names: the names of ``gate``, ``up`` and ``down`` in these files, by the path of the module.
    """

    paths: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    readings: dict[str, ExpertsLayout] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)

    def renaming(self) -> ExpertRenaming:
        """The renaming from the names in the files to those of ``LoadingExperts``."""
        return ExpertRenaming(
            {(path, name): part for path, names in self.names.items() for part, name in names.items()}
        )


def find_experts(model: PreTrainedModel, checkpoint: Checkpoint, names: list[str]) -> CheckpointExperts:
    """Finds among the layers ``names`` of a checkpoint those of experts that the model holds in one module.

    Args:
        model: the model, on the meta device.
        checkpoint: the checkpoint.
        names: the names of linear layers in the checkpoint.

    Raises:
        SmoothQuantError: such a module computes something that ``W8A8Experts`` does not.
    """
    experts = CheckpointExperts()
    modules = {name: module for name, module in model.named_modules() if looks_like_experts(module)}
    if not modules:
        return experts
    for name, renamed in renamed_alone(model, [f"{name}.weight" for name in names]).items():
        key = expert_key(renamed)
        if key is not None and key.path in modules:
            experts.paths[name.removesuffix(".weight")] = key.path, key.expert, key.layer
    for path, reading in match_layouts({path: modules[path] for path, _, _ in experts.paths.values()}).items():
        if reading is None:
            kind = type(modules[path]).__name__
            raise SmoothQuantError(
                f"{checkpoint.directory}: the experts {path} are quantized, but {kind} computes "
                "something other than down(act(gate(x)) * up(x)), which is not supported"
            )
        experts.readings[path] = reading
        # llm-compressor calls them gate_proj, up_proj and down_proj in every model since it unfuses them.
        in_files = {layer for module, _, layer in experts.paths.values() if module == path}
        of_model = expert_names(model, path, reading)
        experts.names[path] = {part: NAMES[part] for part in of_model} if in_files & set(NAMES.values()) else of_model
    return experts


def swap_experts_(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    experts: CheckpointExperts,
    make_layer: Callable[[CheckpointLayer, torch.dtype], W8A8Linear],
) -> None:
    """Replaces the modules of experts that are quantized in the checkpoint by ``LoadingExperts``.

    Args:
        model: the model, on the meta device.
        checkpoint: the checkpoint.
        experts: from ``find_experts``.
        make_layer: makes an empty layer from its description in the checkpoint and the dtype of its bias.

    Raises:
        SmoothQuantError: an expert is missing, or does not fit the configuration or the others.
    """
    has_static = False
    for path, reading in experts.readings.items():
        described = _described_layers(model.get_submodule(path), path, checkpoint, experts)
        has_static |= any(layer.scheme.is_static or not layer.scheme.symmetric for layer in described.values())
        schemes = {layer.scheme.per_token.name for layer in described.values()}
        if len(schemes) > 1:
            kinds = " and ".join(sorted(schemes))
            raise SmoothQuantError(f"{checkpoint.directory}: the experts {path} are quantized as {kinds}, expected one")
        blocks = {(part == "down", layer.rotate) for (_, part), layer in described.items()}
        if len(blocks) > 2:
            raise SmoothQuantError(
                f"{checkpoint.directory}: the inputs of the experts {path} are rotated at run time in blocks of "
                f"different sizes, or some are not, which is not supported; {CONVERT_AGAIN}"
            )
        dtype = next(model.get_submodule(path).parameters()).dtype
        layers = {
            place: make_layer(replace(layer, scheme=layer.scheme.per_token), dtype)
            for place, layer in sorted(described.items())
        }
        names = expert_names(model, path, reading)  # in the checkpoints that will be written
        model.set_submodule(path, LoadingExperts(layers, reading, names))
    if has_static:
        warnings.warn(
            f"{checkpoint.directory}: the inputs of experts get a scale per token, symmetric, which is more exact than "
            "what is stored",
            stacklevel=2,
        )


def _described_layers(
    module: nn.Module, path: str, checkpoint: Checkpoint, experts: CheckpointExperts
) -> dict[tuple[int, str], CheckpointLayer]:
    """The layers that the checkpoint has for the module ``path``, by expert and part; each expert has all its parts."""
    unused = {(expert, layer): name for name, (of, expert, layer) in experts.paths.items() if of == path}
    parameters = dict(module.named_parameters(recurse=False))
    layers: dict[tuple[int, str], CheckpointLayer] = {}
    for part, place in experts.readings[path].parts.items():
        weight, bias = place.weight(parameters), place.bias_of(parameters)
        layer_name = experts.names[path][part]
        for expert in range(len(weight)):
            name = unused.pop((expert, layer_name), None)
            if name is None:
                where = f"{path}.{expert}.{layer_name}"
                raise SmoothQuantError(f"{checkpoint.directory} lacks {where}, though other experts are there")
            layer = checkpoint.layers[name]
            shape = [layer.out_features, layer.in_features]
            if shape != list(weight.shape[1:]):
                raise SmoothQuantError(
                    f"{checkpoint.directory}: {name}.weight is {shape}, but config.json makes it "
                    f"{list(weight.shape[1:])}; {COPY_AGAIN}"
                )
            if (bias is not None) != layer.bias or layer.smooth:
                part_name = "an explicit smoothing scale" if layer.smooth else "a bias" if layer.bias else "no bias"
                raise SmoothQuantError(f"{checkpoint.directory}: {name} has {part_name}, which does not fit its model")
            layers[expert, part] = layer
    if unused:
        raise SmoothQuantError(
            f"{checkpoint.directory}: {min(unused.values())} is no layer of an expert that config.json makes; "
            f"{COPY_AGAIN}"
        )
    return layers


def finish_experts_(model: nn.Module) -> None:
    """Replaces every ``LoadingExperts``, once it is filled, by ``W8A8Experts``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoadingExperts):
            model.set_submodule(path, module.finished())
