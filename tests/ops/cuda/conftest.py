"""Fixtures of the fallback: the ops through torch alone, on the CPU as on GPUs of several architectures."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch_rules import CudaRules

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda import fallback_experts, fallback_gemm
from smoothquant_ext.ops.cuda.fallback import FALLBACKS
from smoothquant_ext.ops.cuda.fallback_quantize import activate


def multiplies_int8_exactly() -> bool:
    """A CPU without VNNI may saturate torch's INT8 sums."""
    extreme = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(extreme, -extreme.t()) == -127 * 127 * 64).all())


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the fallback into ``ops``, and torch's activations into the oracle: what they differ by has tests."""
    if not multiplies_int8_exactly():
        pytest.skip("torch's INT8 product saturates on this CPU")
    for name, implementation in FALLBACKS.items():
        for module in (ops, fallback_experts):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, implementation)
    tanh = partial(FALLBACKS["gelu_mul_quantize"], approximate="tanh")
    gated = {"silu": FALLBACKS["silu_mul_quantize"], "gelu": FALLBACKS["gelu_mul_quantize"], "gelu_tanh": tanh}
    monkeypatch.setattr(fallback_experts, "_GATED", {**fallback_experts._GATED, **gated})
    oracle = {name: lambda x, name=name: activate(name, x) for name in reference.ACTIVATIONS}
    monkeypatch.setattr("smoothquant_ext.reference.gemm.ACTIVATIONS", oracle)


@pytest.fixture(params=[75, 80, 89, 90, 100])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, by_torch: None) -> Iterator[int]:
    """Takes the CPU for a GPU of each architecture in turn, or of a given one, with torch's rules for it."""
    value: int = request.param
    monkeypatch.setattr(fallback_gemm, "arch_of", lambda device: value)
    with CudaRules(value):
        yield value
