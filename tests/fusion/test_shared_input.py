"""Layers that share an input: who is grouped, and that nobody who calls a layer alone gets another layer's result."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tiny import CONFIGS, build, token_ids
from torch import Tensor, nn

from smoothquant_ext import ops
from smoothquant_ext.fusion.decoder_layer import FusedDecoderLayer
from smoothquant_ext.fusion.shared_input import share_inputs_
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe


def quantized(model_type: str = "llama", scheme: str = "int8") -> Any:
    """A model without whole layers, which would leave nothing to share."""
    model = quantize(build(model_type), token_ids(), Recipe(scheme), progress=False)
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            module.__class__ = type(module).__mro__[2]
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of the ops that compute one layer and several."""
    counts = {"w8a8_linear": 0, "w8a8_linear_group": 0}

    def counting(name: str, op: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return op(*args, **kwargs)

        return count

    for name in counts:
        monkeypatch.setattr(ops, name, counting(name, getattr(ops, name)))
    return counts


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_computes_the_same_as_layer_by_layer(model_type: str) -> None:
    model = quantized(model_type)
    ids = token_ids(seed=3)
    with torch.no_grad():
        together = model(ids).logits
        groups = {id(layer.shared) for layer in model.modules() if isinstance(layer, W8A8Linear) and layer.shared}
        for layer in model.modules():
            if isinstance(layer, W8A8Linear):
                layer.shared = None
        assert torch.equal(model(ids).logits, together)
    names = dict(model.named_modules())
    if any(name.endswith("q_proj") for name in names):
        assert len(groups) >= 2  # one for q, k and v in each layer


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
def test_q_k_and_v_are_one_op(scheme: str, calls: dict[str, int]) -> None:
    model = quantized(scheme=scheme)
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        model(token_ids())
    assert calls == {"w8a8_linear": 2, "w8a8_linear_group": 2}  # o; q, k and v; the MLPs are another op


def attention_layers() -> tuple[W8A8Linear, W8A8Linear, W8A8Linear]:
    attention = quantized().model.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def alone(layer: W8A8Linear, x: Tensor) -> Tensor:
    return ops.w8a8_linear(x, layer.weight, layer.weight_scale, layer.bias, layer.input_scale)


def test_results_wait_for_the_same_tensor_only() -> None:
    q, k, v = attention_layers()
    x, other = torch.randn(3, 64), torch.randn(3, 64)
    expected = [alone(layer, x) for layer in (q, k, v)]
    assert torch.equal(q(x), expected[0])
    assert torch.equal(k(other), alone(k, other))  # another tensor
    assert torch.equal(k(x.clone()), expected[1])  # an equal one
    assert torch.equal(v(x), expected[2])
    assert torch.equal(v(x), expected[2])  # twice
    assert torch.equal(k(x), expected[1])
    assert q.shared is not None
    assert q.shared._waiting is None


def test_a_tensor_that_was_changed_in_place_is_another_one() -> None:
    q, k, _ = attention_layers()
    x = torch.randn(3, 64)
    q(x)
    x += 1
    assert torch.equal(k(x), alone(k, x))


def test_inference_tensors_share_too(calls: dict[str, int]) -> None:
    q, k, v = attention_layers()
    calls.update(dict.fromkeys(calls, 0))
    with torch.inference_mode():
        x = torch.randn(3, 64)
        results = q(x), k(x), v(x)
    assert calls == {"w8a8_linear": 0, "w8a8_linear_group": 1}
    assert all(torch.equal(y, alone(layer, x)) for y, layer in zip(results, (q, k, v), strict=True))


def test_a_layer_that_was_replaced_is_not_missed() -> None:
    attention = quantized().model.layers[0].self_attn
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    x = torch.randn(3, 64)
    assert torch.equal(k(x), alone(k, x))  # whoever is first
    assert torch.equal(v(x), alone(v, x))
    q(x)
    y = torch.randn(5, 64)
    q(y)  # what waited for x is gone
    assert torch.equal(k(x), alone(k, x))
    assert torch.equal(k(y), alone(k, y))


def test_copies_and_casts_keep_their_groups() -> None:
    model = quantized()
    ids = token_ids(seed=5)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj(torch.randn(2, 64))  # something waits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        attention = twin.model.layers[0].self_attn
        assert attention.q_proj.shared is attention.k_proj.shared
        assert attention.q_proj.shared is not model.model.layers[0].self_attn.q_proj.shared
        assert attention.q_proj.shared.layers[0] is attention.q_proj
        twin.to(torch.bfloat16)
        assert twin(ids).logits.dtype == torch.bfloat16


def test_threads_do_not_get_each_others_results() -> None:
    q, k, v = attention_layers()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(60):
            x = torch.randn(2, 64, generator=torch.Generator().manual_seed(100 * seed + step))
            wrong.extend(seed for layer in (q, k, v) if not torch.equal(layer(x), alone(layer, x)))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_layers_with_different_static_scales_stay_alone() -> None:
    model = quantized(scheme="int8-static")
    for layer in model.modules():
        if isinstance(layer, W8A8Linear):
            layer.shared = None
    attention = model.model.layers[0].self_attn
    attention.k_proj.input_scale = attention.k_proj.input_scale * 2
    names = share_inputs_(model)
    assert not any("layers.0.self_attn" in name for name in names)
    assert any("layers.1.self_attn" in name for name in names)


def test_other_modules_have_no_groups() -> None:
    assert share_inputs_(nn.Linear(3, 3)) == []


def test_a_compiled_model_computes_layer_by_layer() -> None:
    model = quantized()
    ids = token_ids(seed=7)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    attention = model.model.layers[0]
    compiled = torch.compile(attention.self_attn.q_proj, backend=count, fullgraph=True)
    with torch.no_grad():
        x = torch.randn(2, 3, 64)
        assert torch.equal(compiled(x), alone(attention.self_attn.q_proj, x))
        expected = model(ids).logits
        assert torch.equal(torch.compile(model, backend=count)(ids).logits, expected)
    assert graphs >= 2
