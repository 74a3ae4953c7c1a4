"""What reads hidden states as a linear layer does, so that columns of its weights can take a scale of its input.

Besides linear layers these are the routers of mixtures, which have a matrix and a forward of their own, and the
experts that transformers fuses. A router is recognized by trying: with its input divided and its columns multiplied by
powers of two it must return what it did.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .experts import Reading, looks_like_experts
from .linears import as_linear, find_linears, is_linear, values_of, weight_nk


def find_readers(block: nn.Module, readings: Mapping[str, Reading]) -> dict[str, nn.Module]:
    """The linear layers, routers and experts below ``block`` by name; ``readings`` of experts by their names here."""
    found: dict[str, nn.Module] = dict(find_linears(block))
    for name, module in block.named_modules():
        if name not in found and ((name in readings and looks_like_experts(module)) or _is_router(module)):
            found[name] = module
    return found


def columns_of(module: nn.Module, reading: Reading | None = None) -> list[Tensor]:
    """The weights [N, K] that multiply the channels of a reader's input: views, so that changes reach the module."""
    if reading is not None:
        parameters = dict(module.named_parameters(recurse=False))
        parts = [reading.gate, *([] if reading.up is None else [reading.up])]
        return [weight for part in parts for weight in part.weight(parameters)]
    if is_linear(module):
        return [weight_nk(as_linear(module))]
    weight = values_of(module, "weight")
    assert weight is not None
    return [weight]


def _is_router(module: nn.Module) -> bool:
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if isinstance(module, nn.Embedding) or weight is None or weight.dim() != 2 or any("." in name for name in own):
        return False
    k = weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, k, generator=generator, dtype=torch.float32).to(weight)
    factor = torch.exp2(torch.arange(k) % 5 - 2.0).to(weight)
    try:
        with torch.no_grad():
            before = tree_leaves(module(x))
            scaled = {"weight": weight * factor}
            after = tree_leaves(torch.func.functional_call(module, scaled, (x / factor,)))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    tensors = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)]
    return bool(tensors) and all(_alike(a, b) for a, b in tensors)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    # Powers of two commute with rounding; a kernel may sum in another order.
    eps = torch.finfo(a.dtype).eps
    return torch.allclose(a.float(), b.float(), rtol=8 * eps, atol=8 * eps * float(a.float().abs().mean()))
