"""Recognizes norms by what they compute, not by their classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .linears import values_of
from .numerics import same_elements
from .trying import Failed, attempt

# In fp32: the norm's product, the difference and the sum of two responses, and a product with it, each of numbers a few
# times larger than the result.
NORM_ROUNDINGS = 16


def looks_like_norm(module: nn.Module, args: Any, output: Any) -> bool:
    """Whether a module that made ``output`` of ``args`` may be a norm: one weight per channel, and nothing inside."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not list(module.children())
        and isinstance(output, Tensor)
        and bool(args)
        and isinstance(args[0], Tensor)
        and args[0].shape == output.shape
        and output.shape[-1:] == weight.shape
        and {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}
    )


def norm_offset(norm: nn.Module, *args: Any) -> float | None:
    """The offset of a norm's weight: 0.0 if it multiplies by ``weight``, 1.0 if by ``1 + weight``; ``None`` if neither.

    The norm is run with its weight set to 0, to 1 and to noise. ``args`` are the arguments of its block's call: its
    input, and with some norms a gate.
    """
    weight = values_of(norm, "weight")
    assert weight is not None
    size, device = weight.numel(), weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args[0].shape if args else (4, size), generator=generator).to(device)
    fixed = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in norm.named_parameters(recurse=False)}

    def response(values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(norm, {**fixed, "weight": values.to(device)}, (x, *args[1:]))
        return output.float()

    def examine() -> float | None:
        at_zero, at_one = response(torch.zeros(size)), response(torch.ones(size))
        slope = at_one - at_zero
        offset = float((at_zero / slope).median())
        if not math.isfinite(offset) or round(offset) not in (0, 1):
            return None
        noise = torch.randn(size, generator=generator)
        predicted = (round(offset) + noise.to(device)) * slope
        return float(round(offset)) if same_elements(response(noise), predicted, NORM_ROUNDINGS) else None

    offset = attempt(examine, norm)  # one that needs more than that is no norm that can be tested
    return None if isinstance(offset, Failed) else offset
