"""Calibration: a running absmax equal to the one over all data at once, and errors that name the layer."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.quantization.calibration import calibrate, enough_windows


def test_running_absmax_equals_that_of_all_inputs() -> None:
    model = tiny.build("llama")
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    linears = find_linears(model)  # which tries the layers out
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batches = [tiny.token_ids(seed=seed) for seed in range(3)]
    absmax = calibrate(model, linears, iter(batches))
    handle.remove()
    assert torch.equal(absmax[name], torch.cat(seen).abs().amax((0, 1)))
    assert absmax[name].dtype == torch.float32
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_come_in_running_order_and_batches_may_be_dicts() -> None:
    model = tiny.build("llama")
    batch = {"input_ids": tiny.token_ids(), "attention_mask": torch.ones(2, 24, dtype=torch.int64)}
    names = list(calibrate(model, find_linears(model), [batch]))
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in names] == [*order, *order, "lm_head"]


def test_layers_that_share_an_input_have_equal_absmax() -> None:
    """Which is why they get one static scale without anybody arranging it."""
    model = tiny.build("llama")
    absmax = calibrate(model, find_linears(model), [tiny.token_ids()])
    prefix = "model.layers.0.self_attn."
    assert torch.equal(absmax[prefix + "q_proj"], absmax[prefix + "k_proj"])
    assert torch.equal(absmax[prefix + "q_proj"], absmax[prefix + "v_proj"])


def test_no_batch() -> None:
    model = tiny.build("llama")
    with pytest.raises(SmoothQuantError, match="there is no calibration batch"):
        calibrate(model, find_linears(model), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_is_named_with_the_first_layer_it_reaches(value: float) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = value
    with pytest.raises(
        SmoothQuantError,
        match=r"input of model.layers.1.mlp.(gate|up)_proj is not finite in 1 of 64 channels .*first: 5",
    ):
        calibrate(model, find_linears(model), [tiny.token_ids()])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("watched", ["all", "blocks"])
def test_logits_are_computed_only_where_a_layer_of_the_head_is_watched(watched: str) -> None:
    model = tiny.build("llama")
    tokens: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, args, _output: tokens.append(args[0].shape[1]))
    linears = find_linears(model)
    tokens.clear()
    layers = {name: linear for name, linear in linears.items() if watched == "all" or name != "lm_head"}
    batch = tiny.token_ids()
    absmax = calibrate(model, layers, [batch])
    assert tokens == [batch.shape[1] if watched == "all" else 1]
    assert absmax.keys() == layers.keys()
    labelled = {"input_ids": batch, "labels": batch}  # whose loss takes all logits
    assert all(torch.equal(values, absmax[name]) for name, values in calibrate(model, layers, [labelled]).items())


def test_wide_layers_need_more_windows() -> None:
    model = tiny.build("llama", intermediate_size=1024)
    assert enough_windows(model, 512) == 16
    assert enough_windows(model, 128) == 4 * 1024 / 128
    assert enough_windows(model, 100) == 41
    assert enough_windows(model, 8) == 128
