"""Profiles a quantized model, to show which of its matrix products run in floating point."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

from ..checkpoint.naming import count_quantized
from ..nn.embedding import W8A8Embedding
from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.linears import is_linear

FLOAT_PRODUCTS = frozenset(
    f"aten::{op}" for op in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "matmul", "einsum", "_scaled_mm")
) | {"mkldnn::_linear_pointwise", "aten::mkldnn_linear", "aten::_addmm_activation"}
_QUANTIZED, _FLOAT, _EMBEDDING = "W8A8Linear ", "float linear ", "W8A8Embedding "


@dataclass
class ProductProfile:
    """The matrix products of one forward pass.

    Attributes:
        quantized: how many 8-bit layers the model has.
        eight_bit: calls of each op that multiplies in 8 bits, by name. One op may be the products of several layers.
        float_inside: floating-point products executed inside 8-bit layers, by layer; empty if all is well.
        float_linears: linear layers that the model keeps in floating point and that ran (the output embedding).
        float_elsewhere: floating-point products in no linear layer at all, by name: attention, when it is not fused. An
            8-bit token embedding multiplies rows by 1 and -1 to undo a rotation, which is not counted.
    """

    quantized: int = 0
    eight_bit: Counter[str] = field(default_factory=Counter)
    float_inside: dict[str, list[str]] = field(default_factory=dict)
    float_linears: list[str] = field(default_factory=list)
    float_elsewhere: Counter[str] = field(default_factory=Counter)


@torch.no_grad()
def profile_products(model: nn.Module, tokens: Tensor) -> ProductProfile:
    """Runs a causal LM once on token ids [1, T] under torch's profiler and sorts its matrix products."""
    tokens = tokens.to(next(model.parameters()).device)
    with _scopes(model), _quiet_profiler(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(input_ids=tokens, use_cache=False)
    result = ProductProfile(quantized=count_quantized(model))
    for event in recorded.events() or ():
        if event.cpu_parent is None:
            _sort(event, "", result)
    return result


@contextmanager
def _scopes(model: nn.Module) -> Iterator[None]:
    """Marks in the profile where each linear layer begins and ends."""
    labels: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        is_quantized = isinstance(module, W8A8Linear | W8A8Experts)
        if is_quantized or is_linear(module):
            labels[module] = (_QUANTIZED if is_quantized else _FLOAT) + name
        elif isinstance(module, W8A8Embedding):
            labels[module] = _EMBEDDING + name
    open_scopes: list[Any] = []

    def enter(module: nn.Module, _args: Any) -> None:
        if module in labels:
            open_scopes.append(record_function(labels[module]))
            open_scopes[-1].__enter__()

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if module in labels:
            open_scopes.pop().__exit__(None, None, None)

    # Hooks on the layers themselves would make fused modules step aside: what is profiled is what runs.
    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
        yield


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


def _sort(event: Any, scope: str, result: ProductProfile) -> None:
    """Counts an event and what it calls, given the label of the linear layer it runs in, or ''."""
    name = event.name
    if name.startswith((_QUANTIZED, _FLOAT, _EMBEDDING)):
        scope = name
        if name.startswith(_FLOAT):
            result.float_linears.append(name.removeprefix(_FLOAT))
    elif name.startswith("sq::w8a8"):
        result.eight_bit[name] += 1
    elif name in FLOAT_PRODUCTS:
        if scope.startswith(_QUANTIZED):
            result.float_inside.setdefault(scope.removeprefix(_QUANTIZED), []).append(name)
        elif not scope:
            result.float_elsewhere[name] += 1
        return  # aten::linear is made of aten::addmm: count it once
    for child in event.cpu_children:
        _sort(child, scope, result)
