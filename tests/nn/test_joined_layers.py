"""Layers that read the same input lie side by side on a GPU: one memory, one product, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_w8a8
import torch
from emulation import ROOT
from op_testing import assert_same_bits
from tiny_w8a8 import layers_of
from torch import Tensor

from smoothquant_ext import ops
from smoothquant_ext.nn.linear import W8A8Linear, join_
from smoothquant_ext.nn.placement import are_joined
from smoothquant_ext.scheme import SCHEMES

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
    pytest.mark.usefixtures("gpu"),
]
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
PARTS = ("weight", "weight_scale", "bias")


def groups_of(model: Any) -> list[list[W8A8Linear]]:
    return [[layer.get_submodule(name) for name in group] for layer in model.model.layers for group in GROUPS]


def are_side_by_side(layers: list[W8A8Linear]) -> bool:
    parts = [[getattr(layer, name) for layer in layers] for name in PARTS]
    parts = [part for part in parts if part[0] is not None]
    sizes = [sum(tensor.nbytes for tensor in part) for part in parts]
    return all(are_joined(part) for part in parts) and sizes == [part[0].untyped_storage().nbytes() for part in parts]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # without and with biases
def test_there_and_back(architecture: str, scheme: str) -> None:
    model = tiny_w8a8.quantized(architecture, scheme)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("cuda")
    if scheme.endswith("-static"):  # the inputs of q, k and v have one absmax, and so one scale
        assert len({float(layer.input_scale) for layer in groups_of(model)[0]}) == 1
    assert all(are_side_by_side(group) for group in groups_of(model))
    check_state(model, state)
    model.to("cpu")
    assert not any(are_joined([layer.weight for layer in group]) for group in groups_of(model))
    assert all(layer.is_packed for layer in layers_of(model).values())
    check_state(model, state)


def check_state(model: Any, expected: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(expected)
    for name, tensor in expected.items():
        assert now[name].shape == tensor.shape
        assert tiny_w8a8.same_bits(now[name].cpu(), tensor), name


@pytest.mark.parametrize("scheme", ["int8", "fp8-static"])
def test_casts_and_loads_keep_it(scheme: str) -> None:
    model, other = (tiny_w8a8.quantized("qwen2", scheme, seed=seed).to("cuda") for seed in (0, 1))
    model.load_state_dict(other.state_dict())
    assert all(are_side_by_side(group) for group in groups_of(model))
    check_state(model, {name: tensor.cpu() for name, tensor in other.state_dict().items()})
    model.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)
    assert all(are_side_by_side(group) for group in groups_of(model))
    assert torch.equal(logits(model), logits(other))
    weight = groups_of(model)[0][0].weight
    model.to(torch.bfloat16)
    assert groups_of(model)[0][0].weight.data_ptr() == weight.data_ptr()  # only biases have moved
    assert all(are_side_by_side(group) for group in groups_of(model))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(tiny.token_ids().to(model.device)).logits
    return output


def layer(n: int, k: int, seed: int, scheme: str = "int8", bias: bool = True) -> W8A8Linear:
    generator = torch.Generator().manual_seed(seed)
    made = W8A8Linear(k, n, bias, SCHEMES[scheme], dtype=torch.float32)
    made.weight = torch.randint(-100, 101, (n, k), generator=generator).to(made.weight.dtype)
    made.weight_scale = torch.rand(made.weight_scale.shape, generator=generator) + 0.5
    if bias:
        made.bias = torch.randn(n, generator=generator)
    return made


@pytest.mark.parametrize(("n", "k"), [(24, 32), (32, 24), (15, 1)])
def test_sizes_that_would_move_the_next_layer_off_its_alignment_stay(n: int, k: int) -> None:
    layers = [layer(n, k, seed).to("cuda") for seed in range(2)]
    join_(layers)
    assert not are_joined([each.weight for each in layers])
    assert [each.weight_scale.shape for each in layers] == [(n, 1)] * 2


def test_layers_elsewhere_or_apart_stay() -> None:
    layers = [layer(16, 16, seed) for seed in range(3)]
    weights = [each.weight for each in layers]
    join_(layers)
    layers[0].to("cuda")
    join_(layers)
    assert layers[1].weight is weights[1]
    assert layers[0].weight.untyped_storage().nbytes() == 16 * 16


def test_neighbours_that_are_of_two_memories_are_not_joined() -> None:
    one = torch.zeros(4, 4)
    assert are_joined(one.split(2))
    assert not are_joined(one.split(2)[::-1])
    assert not are_joined([one[:2], one[:2].clone()])
    assert not are_joined([one.T[:2], one.T[2:]])


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 1), (0,), ()])
@pytest.mark.parametrize("bias", [False, True])
def test_ops_of_joined_layers(bias: bool, rows: tuple[int, ...], scheme: str) -> None:
    """The results of the layers apart, and contiguous."""
    x = torch.randn(*rows, 32, generator=torch.Generator().manual_seed(9)).to("cuda")
    apart = [layer(n, 32, seed, scheme, bias).to("cuda") for seed, n in enumerate((48, 16, 48))]
    joined = [layer(n, 32, seed, scheme, bias).to("cuda") for seed, n in enumerate((48, 16, 48))]
    join_(joined)
    assert are_side_by_side(joined)
    expected, results = (
        ops.w8a8_linear_group(x, *ops.as_lists(each.tensors for each in layers), None) for layers in (apart, joined)
    )
    for result, one in zip(results, expected, strict=True):
        assert result.is_contiguous()
        assert_same_bits(result.cpu(), one.cpu())
    down = layer(32, 48, 7, scheme, bias).to("cuda")
    gates = [[layers[0], layers[2], down] for layers in (apart, joined)]
    gates[1][:2] = [layer(48, 32, seed, scheme, bias).to("cuda") for seed in (0, 2)]
    join_(gates[1][:2])
    assert are_side_by_side(gates[1][:2])
    one, result = (ops.w8a8_mlp(x, *ops.as_lists(each.tensors for each in layers), None, "silu") for layers in gates)
    assert_same_bits(result.cpu(), one.cpu())


def test_one_row_is_one_product() -> None:
    x = torch.randn(1, 32).to("cuda")
    layers = [layer(16, 32, seed).to("cuda") for seed in range(3)]
    join_(layers)
    q, k, v = ops.w8a8_linear_group(x, *ops.as_lists(each.tensors for each in layers), None)
    assert len({each.untyped_storage().data_ptr() for each in (q, k, v)}) == 1
