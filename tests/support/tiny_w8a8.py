"""A tiny model in 8 bits, and how to compare it with what comes back from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.scheme import SCHEMES

IDS = tiny.token_ids()
COMPRESSED = [scheme.name for scheme in SCHEMES.values() if scheme.dtype != torch.float8_e5m2]
DYNAMIC = [scheme.name for scheme in SCHEMES.values() if not scheme.is_static]


def quantized(
    model_type: str = "llama", scheme: str = "int8", names: Iterable[str] | None = None, **overrides: object
) -> PreTrainedModel:
    """A tiny model whose linear layers, besides the output embedding, are quantized without smoothing."""
    model = tiny.build(model_type, **overrides)
    linears = find_linears(model)
    head = model.get_output_embeddings()
    names = [name for name, linear in linears.items() if linear is not head] if names is None else list(names)
    absmax: dict[str, Tensor] = {}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor]) -> None:
            absmax[name] = arguments[0].detach().abs().flatten(0, -2).amax(0).float()

        return hook

    handles = [linears[name].register_forward_pre_hook(measure(name)) for name in names]
    logits(model)
    for handle in handles:
        handle.remove()
    for name in names:  # an expert's router may have sent it nothing
        absmax.setdefault(name, torch.ones(1))
    convert_(model, names, absmax, SCHEMES[scheme])
    fuse_(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
    )


def assert_same_model(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    expected, state = model.state_dict(), loaded.state_dict()
    assert list(state) == list(expected)
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []
    assert torch.equal(logits(loaded), logits(model))


def layers_of(model: nn.Module) -> dict[str, W8A8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, W8A8Linear)}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())
