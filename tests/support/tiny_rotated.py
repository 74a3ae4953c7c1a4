"""Tiny models in 8 bits of which some layers' inputs are rotated at run time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tiny
import torch
from tiny_w8a8 import logits
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothquant_ext import Recipe, quantize
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.hadamard import rotate_blocks
from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.linears import find_linears, weight_nk
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.scheme import SCHEMES

DOWN = {r"\.(down_proj|fc2|mlp\.c_proj)$": 16}


def rotated(
    model_type: str = "llama", scheme: str = "int8", blocks: Mapping[str, int] = DOWN, **overrides: object
) -> PreTrainedModel:
    """A tiny model whose linear layers, besides the output embedding, are quantized without smoothing.

    ``blocks`` gives the size of the rotated blocks of the layers whose names match.
    """
    model = tiny.build(model_type, **overrides)
    head = model.get_output_embeddings()
    linears = {name: linear for name, linear in find_linears(model).items() if linear is not head}
    sizes = {
        name: next((block for pattern, block in blocks.items() if re.search(pattern, name)), 0) for name in linears
    }
    assert any(sizes.values())
    absmax: dict[str, Tensor] = {}

    def measure(name: str, x: Tensor) -> None:
        absmax[name] = rotate_blocks(x.detach(), sizes[name]).abs().flatten(0, -2).amax(0).float()

    handles = [
        linear.register_forward_pre_hook(lambda _module, args, name=name: measure(name, args[0]))
        for name, linear in linears.items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    for name, linear in linears.items():
        with torch.no_grad():
            weight_nk(linear).copy_(rotate_blocks(weight_nk(linear), sizes[name]))
    convert_(model, linears, absmax, SCHEMES[scheme])
    for name, block in sizes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, W8A8Linear)
        layer.rotate = block
    fuse_(model)
    return model


def rotated_mixture(model_type: str, block: int = 16, dense: int = 0) -> PreTrainedModel:
    """A tiny mixture in 8 bits of whose experts what ``down`` reads is rotated, and of its other layers' ``down_proj``
    too, in blocks of ``dense``, or not.
    """
    model = tiny.build(model_type)
    blocks = {}
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(weight := getattr(module, "down_proj", None), Tensor) and weight.dim() == 3:
                is_transposed = model_type == "llama4_text"
                weight = weight.transpose(1, 2) if is_transposed else weight
                weight.copy_(rotate_blocks(weight, block))
                blocks[path] = block
            elif path.endswith("down_proj") and isinstance(module, nn.Linear) and dense:
                module.weight.copy_(rotate_blocks(module.weight, dense))
                blocks[path] = dense
    quantize(model, [tiny.token_ids()], Recipe("int8", smooth=False), progress=False)
    for path in blocks:
        module = model.get_submodule(path)
        assert isinstance(module, W8A8Experts | W8A8Linear)
        if isinstance(module, W8A8Experts):
            module.rotate = (0, blocks[path])
        else:
            module.rotate = blocks[path]
    return model


def blocks_of(model: nn.Module) -> dict[str, Any]:
    """The size of the rotated blocks of each layer and of each module of experts."""
    return {
        name: module.rotate for name, module in model.named_modules() if isinstance(module, W8A8Linear | W8A8Experts)
    }
