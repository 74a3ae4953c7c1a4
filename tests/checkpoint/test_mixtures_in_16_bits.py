"""Mixtures of every family, in every dtype, come back to the bit: whatever transformers reads in fp32 by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import tiny_mixtures
import torch
from tiny_w8a8 import same_bits
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from smoothquant_ext import Recipe, disable, enable, load, quantize, save
from smoothquant_ext.checkpoint.hf_quantizer import W8A8Quantizer
from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.nn.linear import W8A8Linear

IDS = tiny.token_ids(seed=9)
FAMILIES = [family for family in tiny_mixtures.FAMILIES if family in CONFIG_MAPPING]
KEPT = [family for family in tiny_mixtures.KEPT_IN_FP32 if family in CONFIG_MAPPING]
HALVES = [torch.bfloat16, torch.float16]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS, use_cache=False).logits
    return result


def saved(family: str, scheme: str, dtype: torch.dtype, directory: Path) -> PreTrainedModel:
    recipe = Recipe(scheme, smooth=False, rounding="nearest")
    model = quantize(tiny_mixtures.build(family, dtype), [tiny.token_ids()], recipe, progress=False)
    assert any(isinstance(module, W8A8Experts) for module in model.modules())
    save(model, directory)
    return model


def assert_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    expected, state = model.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_to_the_bit(family: str, tmp_path: Path) -> None:
    model = saved(family, "fp8", torch.bfloat16, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_every_scheme_in_every_dtype(family: str, dtype: torch.dtype, scheme: str, tmp_path: Path) -> None:
    model = saved(family, scheme, dtype, tmp_path / "model")
    assert_same(load(tmp_path / "model"), model)


@pytest.mark.parametrize("family", KEPT)
def test_every_way_of_loading(family: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = saved(family, "fp8", torch.float16, tmp_path / "model")
    enable()
    try:
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map={"": "cpu"}), model)
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16), model)
    finally:
        disable()


def test_versions_of_transformers_that_do_not_ask_for_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("deepseek_v3", "fp8", torch.bfloat16, tmp_path / "model")
    monkeypatch.setattr(W8A8Quantizer, "get_new_dtype", lambda self, converter, param, dtype: dtype)
    assert_same(load(tmp_path / "model"), model)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The scales of the 8-bit layers and their weights, by name: what no cast may touch."""
    return {
        f"{path}.{name}": buffer
        for path, module in model.named_modules()
        if isinstance(module, W8A8Linear | W8A8Experts)
        for name, buffer in module._buffers.items()
        if buffer is not None and not name.endswith("bias")
    }


@pytest.mark.parametrize(("family", "scheme"), [("deepseek_v3", "fp8-static"), ("mixtral", "int8-static")])
def test_scales_stay_fp32_whatever_dtype_is_asked_for(family: str, scheme: str, tmp_path: Path) -> None:
    expected = scales(saved(family, scheme, torch.float32, tmp_path / "model"))
    for dtype in (*HALVES, torch.float32):
        loaded = load(tmp_path / "model", dtype=dtype)
        assert all(same_bits(scale, expected[name]) for name, scale in scales(loaded).items())
        for cast in (loaded.half, loaded.bfloat16, loaded.float):
            cast()
            assert scales(loaded).keys() == expected.keys()
            assert all(same_bits(scale, expected[name]) for name, scale in scales(loaded).items())
            assert bool(logits(loaded).isfinite().all())


@pytest.mark.parametrize("pattern", ["down_proj", "q_a_proj.weight", "weight"])
def test_a_pattern_of_transformers_that_matches_an_8_bit_layer(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved("deepseek_v3", "fp8", torch.bfloat16, tmp_path / "model")
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules_strict", [pattern])
    loaded = scales(load(tmp_path / "model"))
    expected = scales(model)
    assert loaded.keys() == expected.keys()
    assert [name for name in expected if not same_bits(loaded[name], expected[name])] == []


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_a_layer_whose_code_reads_the_dtype_of_its_weight_stays_in_floating_point(family: str) -> None:
    recipe = Recipe("int8", smooth=False, rounding="nearest")
    model = quantize(tiny_mixtures.build(family, torch.float32), [tiny.token_ids()], recipe, progress=False)
    skipped = {name: reason for name, reason in model.smoothquant_report.skipped.items() if "weights_proj" in name}
    assert set(skipped.values()) == {"transformers keeps it in fp32"}
    assert bool(logits(model).isfinite().all())
