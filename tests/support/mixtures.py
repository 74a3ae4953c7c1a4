"""Modules of experts, in the layouts that models use and in some that cannot be read."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.probing.experts import match_experts_layout
from smoothquant_ext.quantization.convert import quantize_experts
from smoothquant_ext.scheme import SCHEMES

EXPERTS, K, INNER, N = 5, 24, 40, 24
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": functools.partial(gelu, approximate="tanh"), "relu": relu}


class Mixture(nn.Module):
    """Experts as some model might keep them."""

    def __init__(self, layout: str = "gate, up", activation: Any = silu, is_transposed: bool = False, bias: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.activation, self.is_transposed, self.bias = layout, activation, is_transposed, bias
        inner = INNER if layout in ("apart", "plain") else 2 * INNER
        names = {"first": (inner, K), "down": (N, INNER)} | ({"second": (inner, K)} if layout == "apart" else {})
        for name, (n, k) in names.items():
            shape = (EXPERTS, k, n) if is_transposed else (EXPERTS, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / k**0.5))
            if bias:
                self.register_parameter(name + bias, nn.Parameter(torch.randn(EXPERTS, n)))

    def layer(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ (weight if self.is_transposed else weight.T)
        return y + getattr(self, name + self.bias)[expert] if self.bias else y

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        y = self.layer("first", expert, x)
        if self.layout == "plain":
            return self.activation(y)
        if self.layout == "apart":
            return self.activation(y) * self.layer("second", expert, x)
        first, second = (y[..., ::2], y[..., 1::2]) if "interleaved" in self.layout else y.chunk(2, dim=-1)
        return self.activation(first) * second if "gate, up" in self.layout else self.activation(second) * first

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(len(x), N, dtype=x.dtype)
        for token in range(len(x)):
            for slot, expert in enumerate(index[token].tolist()):
                out = self.layer("down", expert, self.hidden(expert, x[token]))
                y[token] += weights[token, slot] * out
        return y


class Backwards(Mixture):
    """Counts its experts from the last one."""

    def layer(self, name: str, expert: int, x: Tensor) -> Tensor:
        return super().layer(name, EXPERTS - 1 - expert, x)


class Ranked(Mixture):
    """Expert i counts i times."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        return super().hidden(expert, x) * expert


class Clamped(Mixture):
    """As GPT-OSS: values are cut off, and 1 is added to those of up."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.layer("first", expert, x).chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)


class Limited(Mixture):
    """Cuts off what is far larger than usual."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.layer("first", expert, x).chunk(2, dim=-1)
        return silu(gate.clamp(max=100.0)) * up


class Sorted(Mixture):
    """As Llama 4: called with the tokens of one expert after the other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        experts = len(self.first)
        rows = x.view(experts, -1, K)
        out = [self.layer("down", expert, self.hidden(expert, rows[expert])) for expert in range(experts)]
        return torch.cat(out)


LAYOUTS = ("gate, up", "up, gate", "interleaved gate, up", "interleaved up, gate", "apart", "plain")


def chosen(tokens: int, slots: int = 2, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)])
    return index, torch.rand(tokens, slots, generator=generator)


def made(scheme: str = "int8", bias: str = "", layout: str = "gate, up") -> W8A8Experts:
    module = Mixture(layout, bias=bias)
    reading = match_experts_layout(module)
    assert reading is not None
    return quantize_experts(module, reading, SCHEMES[scheme])
