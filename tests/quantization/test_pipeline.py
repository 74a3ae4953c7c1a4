"""The algorithm as a whole, on tiny models of many architectures with real kernels."""

from __future__ import annotations

import pytest
import tiny
import torch
from discover_once import discover_once as discover_once  # a fixture
from tiny import logits, relative_error
from torch import nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.report import Report
from smoothquant_ext.scheme import SCHEMES

CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_architecture_runs_in_8_bits(model_type: str) -> None:
    model = tiny.build(model_type)
    ids = tiny.token_ids(seed=9)
    expected = logits(model, ids)
    quantized = quantize(model, CALIBRATION, progress=False)
    assert quantized is model
    report: Report = model.smoothquant_report
    assert report.quantized
    # Nothing fails the proof; the norm before experts that are not read has these as another reader.
    assert all("is also read by something other than" in reason for reason in report.failed.values())
    assert all(isinstance(model.get_submodule(name), W8A8Linear | W8A8Experts) for name in report.quantized)
    # 8 bits leave about 1 % per layer; an untrained model of two blocks does not shrink it.
    assert relative_error(model, expected, ids) < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_smoothing_helps_where_there_are_outliers(scheme: str) -> None:
    ids = tiny.token_ids(seed=9)
    errors = {}
    for smooth in (False, True):
        model = tiny.build("llama")
        tiny.amplify_outliers(model, factor=300.0)
        expected = logits(model, ids)
        quantize(model, CALIBRATION, Recipe(scheme, smooth=smooth), progress=False)
        errors[smooth] = relative_error(model, expected, ids)
    if SCHEMES[scheme].dtype == torch.int8:
        assert errors[True] < errors[False] / 2
    else:  # floating-point formats carry outliers by themselves: smoothing must not hurt
        assert errors[True] < errors[False] * 1.25


def test_static_scales_are_shared_by_layers_that_share_an_input() -> None:
    model = quantize(tiny.build("llama"), CALIBRATION, Recipe("int8-static"), progress=False)
    for layer in model.model.layers:
        q, k, v = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        assert torch.equal(q.input_scale, k.input_scale)
        assert torch.equal(q.input_scale, v.input_scale)
        assert torch.equal(layer.mlp.gate_proj.input_scale, layer.mlp.up_proj.input_scale)


def test_report() -> None:
    model = quantize(tiny.build("gpt2"), CALIBRATION, Recipe(skip=("h.0.mlp.c_fc",)), progress=False)
    report: Report = model.smoothquant_report
    assert report.skipped == {"lm_head": "output embedding", "transformer.h.0.mlp.c_fc": "skipped by pattern"}
    assert "transformer.h.0.mlp.c_fc" not in report.quantized
    assert report.unsmoothed == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]  # behind GELU
    assert {group.producer for group in report.groups} >= {"transformer.h.0.ln_1", "transformer.h.1.ln_2"}
    assert set(report.seconds) == {"Calibrating", "Finding smoothing groups", "Quantizing blocks"}


def test_batches_may_be_a_tensor_a_list_or_a_generator() -> None:
    ids = tiny.token_ids(rows=4, seed=3)
    outputs = []
    for form in (ids, list(ids.split(1)), (row for row in ids.split(1))):
        model = quantize(tiny.build("llama"), form, progress=False)
        outputs.append(logits(model, tiny.token_ids(seed=9)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "batches", [[], torch.empty(0, 8, dtype=torch.int64), iter(())], ids=["list", "tensor", "iterator"]
)
def test_no_calibration_data(batches: object) -> None:
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SmoothQuantError, match="there is no calibration batch"):
        quantize(model, batches, progress=False)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_never_runs_stays_as_it_is() -> None:
    model = tiny.build("llama")
    model.model.layers[0].idle = nn.Linear(64, 64)
    quantize(model, CALIBRATION, progress=False)
    assert model.smoothquant_report.skipped["model.layers.0.idle"] == "never ran during calibration"
    assert isinstance(model.model.layers[0].idle, nn.Linear)


def test_no_float_weight_is_left_behind() -> None:
    model = quantize(tiny.build("llama"), CALIBRATION, progress=False)
    for name, parameter in model.named_parameters():
        assert "proj" not in name, f"{name} is still a float parameter of {tuple(parameter.shape)}"
