"""What a quantized model really executes: a profile that shows which matrix products are left in floating point."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from .modules import W8A8Linear

FLOAT_PRODUCTS = frozenset(
    f"aten::{op}" for op in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "einsum", "_scaled_mm")
) | {"mkldnn::_linear_pointwise", "aten::mkldnn_linear", "aten::_addmm_activation"}
EIGHT_BIT_PRODUCTS = frozenset({"sq::w8a8_linear", "sq::w8a8_gemm"})
_SCOPE = "W8A8Linear "


@dataclass
class ProductProfile:
    """The matrix products of one forward pass.

    Attributes:
        eight_bit: how many calls of an 8-bit product each quantized layer made, by layer name.
        float_inside: the floating-point products executed inside quantized layers, by layer name; empty if all is well.
        float_outside: the floating-point products elsewhere (output embedding, attention, rotary embedding).
    """

    eight_bit: Counter[str] = field(default_factory=Counter)
    float_inside: dict[str, list[str]] = field(default_factory=dict)
    float_outside: Counter[str] = field(default_factory=Counter)


@torch.no_grad()
def profile_products(model: nn.Module, tokens: Tensor) -> ProductProfile:
    """Runs a causal LM once on token ids [1, T] under torch's profiler and sorts its matrix products."""
    tokens = tokens.to(next(model.parameters()).device)
    with _scopes(model), _quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(input_ids=tokens, use_cache=False)
    result = ProductProfile()
    for event in recorded.events() or ():
        if event.cpu_parent is None:
            _sort(event, None, result)
    return result


@contextmanager
def _scopes(model: nn.Module) -> Iterator[None]:
    """Marks in the profile where each quantized layer begins and ends."""
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, W8A8Linear):
            continue
        open_scopes: list[Any] = []

        def enter(_module: nn.Module, _args: Any, name: str = name, scopes: list[Any] = open_scopes) -> None:
            scopes.append(record_function(_SCOPE + name))
            scopes[-1].__enter__()

        def leave(_module: nn.Module, _args: Any, _output: Any, scopes: list[Any] = open_scopes) -> None:
            scopes.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's library from writing its stages to stderr, which it does in some releases of torch."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "9"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def _sort(event: Any, layer: str | None, result: ProductProfile) -> None:
    if event.name.startswith(_SCOPE):
        layer = event.name.removeprefix(_SCOPE)
        result.eight_bit[layer] += 0
    elif layer is not None and event.name in EIGHT_BIT_PRODUCTS:
        result.eight_bit[layer] += 1
    elif event.name in FLOAT_PRODUCTS:
        if layer is None:
            result.float_outside[event.name] += 1
        else:
            result.float_inside.setdefault(layer, []).append(event.name)
        return  # aten::linear is made of aten::addmm: count it once
    for child in event.cpu_children:
        _sort(child, layer, result)
