"""The names of a quantized model's layers and tensors in a checkpoint, and the configuration that lists them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..nn.embedding import shares_head
from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..scheme import Scheme, dtype_name
from ..traits import embedding_of
from .formats.base import EXPERTS, LAYERS, Format
from .formats.registry import choose_format
from .hf_names import plain_tensors, renamed_alone, to_checkpoint_modules, to_checkpoint_tensors, to_model_names


@dataclass(frozen=True)
class CheckpointNames:
    """Names of the parts of a quantized model in a checkpoint.

    Attributes:
        layers: the name in the checkpoint of each quantized layer, by its path in the model.
        schemes: the scheme of each layer by both names, because transformers compares paths in its model and other
            engines compare names in the checkpoint; of experts by a pattern for all layers of a mixture.
        ignore: the names of the layers that other tools take for linear ones and that stay in floating point.
        blocks: the size of the rotated blocks of each layer's input by both names, 0 for none and for other modules.
    """

    layers: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    ignore: list[str]
    blocks: Mapping[str, int]

    def quantization_config(self, fmt: Format) -> dict[str, Any]:
        """The ``quantization_config`` of these layers in a format."""
        return fmt.quantization_config(self.schemes, self.ignore) | fmt.rotation_config(self.blocks, self.ignore)


def quantized_layers(model: nn.Module) -> dict[str, W8A8Linear]:
    """The 8-bit layers of a model by path; for a mixture the layers of each expert, which are views."""
    layers: dict[str, W8A8Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, W8A8Linear):
            layers[path] = module
        elif isinstance(module, W8A8Experts):
            layers |= {f"{path}.{local}": layer for local, layer in module.layers()}
    return layers


def has_untied_head(model: PreTrainedModel) -> bool:
    """Whether the output embedding has an 8-bit weight that is not that of the token embedding."""
    return isinstance(embedding_of(model, "output"), W8A8Linear) and not shares_head(model)


def count_quantized(model: nn.Module) -> int:
    """The number of modules of a model that run in 8 bits; the experts of a mixture are one."""
    return sum(isinstance(module, W8A8Linear | W8A8Experts) for module in model.modules())


def float_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores besides those of the 8-bit layers, by name in the checkpoint.

    A tensor that transformers stores in one with the weights of 8-bit layers has its name in the model.
    """
    plain = plain_tensors(model, besides=(W8A8Linear, W8A8Experts))
    tensors = to_checkpoint_tensors(model, plain)
    for merged, parts in _merged_with_8_bits(model, plain, tensors).items():
        del tensors[merged]
        tensors |= {name: plain[name] for name in parts}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    return tensors


def _merged_with_8_bits(
    model: PreTrainedModel, plain: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """The tensors ``stored`` that would be larger if no layer had 8 bits, with the tensors that each is made of."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, W8A8Linear)}
    shapes: dict[str, Sequence[int]] = {name: tensor.shape for name, tensor in plain.items()}
    shapes |= {f"{path}.weight": (layer.out_features, layer.in_features) for path, layer in layers.items()}
    try:
        whole = to_checkpoint_tensors(model, {name: torch.empty(shapes[name], device="meta") for name in shapes})
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, ValueError):
        return {}  # a conversion that needs the values
    partial = {name for name, tensor in stored.items() if name in whole and whole[name].shape != tensor.shape}
    parts: dict[str, list[str]] = {name: [] for name in partial}
    for name in plain if partial else ():
        for key in partial & to_checkpoint_tensors(model, {name: plain[name]}).keys():
            parts[key].append(name)
    return parts


def checkpoint_names(
    model: PreTrainedModel, layers: Mapping[str, W8A8Linear], floats: Mapping[str, Tensor]
) -> CheckpointNames:
    """The names of a model's layers in a checkpoint.

    Args:
        model: the model.
        layers: from ``quantized_layers``.
        floats: from ``float_tensors``.
    """
    modules = dict(model.named_modules())
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    embeddings = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    names = to_checkpoint_modules(model, [*layers, *linears, *embeddings])
    # Routers and the experts that transformers fuses are no nn.Linear here, but are linear layers to vLLM.
    matrices = {name for name, tensor in floats.items() if tensor.dim() == 2 and name.endswith(".weight")}
    others = {name.removesuffix(".weight") for name in matrices} - {names[path] for path in (*linears, *embeddings)}
    mixtures = {path for path, module in modules.items() if isinstance(module, W8A8Experts)}
    schemes: dict[str, Scheme] = {}
    for path, layer in layers.items():
        for name in (names[path], path):
            schemes[all_experts(name) if _module_of(path) in mixtures else name] = layer.scheme
    return CheckpointNames(
        {path: names[path] for path in layers},
        schemes,
        list(dict.fromkeys([*(names[path] for path in linears), *linears, *sorted(others)])),
        dict.fromkeys(filter(None, modules), 0)
        | {name: layer.rotate for path, layer in layers.items() for name in (names[path], path)},
    )


def rotated_in(model: nn.Module, layers: Mapping[str, W8A8Linear]) -> list[str]:
    """``rotated_parts`` of a model with the layers of ``quantized_layers``."""
    mixtures = {path for path, module in model.named_modules() if isinstance(module, W8A8Experts)}
    blocks = {path: layer.rotate for path, layer in layers.items()}
    return rotated_parts(blocks, {path for path in layers if _module_of(path) in mixtures})


# Of experts, whether the model here holds them in one module or not.
_OF_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def rotated_parts(blocks: Mapping[str, int], experts: Collection[str] = ()) -> list[str]:
    """What of a checkpoint is rotated at run time, of ``LAYERS`` and ``EXPERTS``.

    Args:
        blocks: the size of the rotated blocks of each layer's input, 0 for none, by the name of the layer.
        experts: the names of the layers of experts, besides those that look like such.
    """
    rotated = {name for name, block in blocks.items() if block}
    of_experts = {name for name in rotated if name in experts or _OF_EXPERT.search(name)}
    return [part for part, names in ((LAYERS, rotated - of_experts), (EXPERTS, of_experts)) if names]


def names_of_layers(model: PreTrainedModel, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """All names of each of the layers ``names`` of a checkpoint: that in the files, then those in the model.

    A configuration may use any of them, since some tools read names from the files and others from the model.
    """
    keys = [f"{name}.weight" for name in sorted(names)]
    paths, alone = to_model_names(model, keys), renamed_alone(model, keys)
    return {
        key.removesuffix(".weight"): tuple(
            dict.fromkeys(name.removesuffix(".weight") for name in (key, paths[key], alone[key]) if name is not None)
        )
        for key in keys
    }


def set_quantization_config_(model: PreTrainedModel) -> dict[str, str]:
    """Gives a quantized model the ``quantization_config`` of its state dict, so that ``save_pretrained`` is right.

    Returns:
        What ``finalize_`` has to refuse: ``save_pretrained``, where the only format that can store the model has other
        names of tensors than the state dict, and another size of an 8-bit vocabulary.
    """
    layers = quantized_layers(model)
    if not layers:
        return {}
    explicit = any(layer.smooth is not None for layer in layers.values())
    schemes, shared = [layer.scheme for layer in layers.values()], shares_head(model)
    fmt = choose_format(None, schemes, explicit, rotated_in(model, layers), shared)
    names = checkpoint_names(model, layers, float_tensors(model))
    if has_untied_head(model):
        model.config.tie_word_embeddings = False
    model.config.quantization_config = names.quantization_config(fmt)
    refused = {}
    if isinstance(embedding_of(model, "output"), W8A8Linear):
        refused["resize_token_embeddings"] = "the output embedding has 8 bits; resize it before the model is quantized"
    if fmt.tensors.is_state_dict:
        return refused
    dtypes = " and ".join(sorted({dtype_name(layer.scheme.dtype) for layer in layers.values()}))
    return refused | {
        "save_pretrained": f"{dtypes} is stored in format {fmt.name!r}, whose tensors have other names; use "
        "smoothquant_ext.save(model, directory)"
    }


def _module_of(name: str) -> str:
    """The module that holds all experts, from the name of one expert's layer."""
    return name.rpartition(".")[0].rpartition(".")[0]


def all_experts(name: str) -> str:
    """A target for all layers of all experts of a mixture: there are thousands."""
    return f"re:{re.escape(_module_of(name))}\\.\\d+\\.\\w+$"
