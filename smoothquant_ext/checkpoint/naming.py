"""What a quantized model says of itself: the configuration that goes with its state dict, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import SmoothQuantError
from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..scheme import Scheme
from .formats.base import choose_format, quantization_config
from .hf_names import plain_tensors, to_checkpoint_modules, to_checkpoint_tensors


@dataclass(frozen=True)
class Naming:
    """What the parts of a quantized model are called in a checkpoint.

    Attributes:
        layers: the name in the checkpoint of each quantized layer, by its path in the model.
        schemes: the scheme of each, by both names: transformers compares with its own, other engines with the former;
            of experts by a pattern for all of a mixture.
        ignore: names of the layers that other tools take for linear ones and that stay in floating point.
    """

    layers: Mapping[str, str]
    schemes: Mapping[str, Scheme]
    ignore: list[str]


def quantized_layers(model: nn.Module) -> dict[str, W8A8Linear]:
    """The 8-bit layers of a model, by name; of experts the layers of each, which are views."""
    found: dict[str, W8A8Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, W8A8Linear):
            found[name] = module
        elif isinstance(module, W8A8Experts):
            found |= {f"{name}.{local}": layer for local, layer in module.layers()}
    return found


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a checkpoint stores besides the 8-bit layers, by its name there."""
    plain = to_checkpoint_tensors(model, plain_tensors(model, besides=(W8A8Linear, W8A8Experts)))
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        plain.pop(name, None)
    return plain


def naming(model: PreTrainedModel, layers: Mapping[str, W8A8Linear], plain: Mapping[str, Tensor]) -> Naming:
    """The names of a model's layers; ``plain`` from ``stored_tensors``."""
    modules = dict(model.named_modules())
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    embeddings = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    names = to_checkpoint_modules(model, [*layers, *linears, *embeddings])
    # Routers and the experts that transformers fuses are no nn.Linear here, but are linear layers to vLLM.
    matrices = {name for name, tensor in plain.items() if tensor.dim() == 2 and name.endswith(".weight")}
    others = {name.removesuffix(".weight") for name in matrices} - {names[path] for path in (*linears, *embeddings)}
    mixtures = {path for path, module in modules.items() if isinstance(module, W8A8Experts)}
    schemes: dict[str, Scheme] = {}
    for path, layer in layers.items():
        for name in (names[path], path):
            schemes[_all_experts(name) if _module_of(path) in mixtures else name] = layer.scheme
    return Naming(
        {path: names[path] for path in layers},
        schemes,
        list(dict.fromkeys([*(names[path] for path in linears), *linears, *sorted(others)])),
    )


def count_quantized(model: nn.Module) -> int:
    """How many modules of a model run in 8 bits: the experts of a mixture are one."""
    return sum(isinstance(module, W8A8Linear | W8A8Experts) for module in model.modules())


def _module_of(name: str) -> str:
    """The module that holds all experts, of the name of one expert's layer."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _all_experts(name: str) -> str:
    """A target for all layers of all experts of a mixture: there are thousands."""
    return f"re:{re.escape(_module_of(name))}\\.\\d+\\.\\w+$"


def describe_(model: PreTrainedModel) -> None:
    """Gives a quantized model the ``quantization_config`` of its state dict, so that ``save_pretrained`` is right.

    It also freezes what is left in floating point, so that a forward pass without ``no_grad`` is as fast as one with,
    and refuses, with a sentence, what 8-bit layers cannot do: gradient checkpointing, and ``save_pretrained`` of
    FP8 e5m2, whose only format has other names.
    """
    layers = quantized_layers(model)
    if not layers:
        return
    model.requires_grad_(False)
    explicit = any(layer.smooth is not None for layer in layers.values())
    fmt = choose_format(None, [layer.scheme for layer in layers.values()], explicit)
    names = naming(model, layers, stored_tensors(model))
    if isinstance(model.get_output_embeddings(), W8A8Linear):
        model.config.tie_word_embeddings = False  # its 8-bit weight is its own now
    model.config.quantization_config = quantization_config(fmt, names.schemes, names.ignore)
    refused = {
        "gradient_checkpointing_enable": "an 8-bit model cannot use gradient checkpointing; train adapters without it"
    }
    if fmt.name == "lmdeploy":
        refused["save_pretrained"] = "FP8 e5m2 has a format of its own: use smoothquant_ext.save(model, directory)"
    for method, reason in refused.items():
        vars(model)[method] = partial(_refuse, reason)


def _refuse(reason: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise SmoothQuantError(reason)
