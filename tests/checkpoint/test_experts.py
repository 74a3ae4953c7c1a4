"""Checkpoints of mixtures: the names are those of the floating-point model, the numbers come back to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothquant_ext import Recipe, SmoothQuantError, disable, enable, load, quantize, save
from smoothquant_ext.nn.experts import W8A8Experts

MODELS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2-lite",
    "deepseek_v3-moe",
    "granitemoe",
    "llama4_text",
)
CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]
IDS = tiny.token_ids(seed=9)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def experts_of(model: nn.Module) -> list[W8A8Experts]:
    return [module for module in model.modules() if isinstance(module, W8A8Experts)]


def saved(name: str, directory: Path, scheme: str = "int8", **options: Any) -> PreTrainedModel:
    model = quantize(tiny.build(name), CALIBRATION, Recipe(scheme, **options), progress=False)
    save(model, directory)
    return model


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    result: str = request.param
    return result


@pytest.fixture(scope="module")
def int8(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A quantized model and its checkpoint."""
    directory = tmp_path_factory.mktemp("int8") / "model"
    return saved(name, directory), directory


def test_names_are_those_of_the_float_checkpoint(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "model", smooth=False)
    tiny.build(name).save_pretrained(tmp_path / "float")
    ours, theirs = (load_file(tmp_path / which / "model.safetensors") for which in ("model", "float"))
    fused = {"granitemoe": "block_sparse_moe.input_linear.weight", "llama4_text": "feed_forward.experts.gate_up_proj"}
    if name in fused:  # their checkpoints keep the experts fused, which has no place for what is 8 bits here
        assert f"model.layers.1.{fused[name]}" in theirs
        moe = fused[name].partition(".")[0]
        assert ours[f"model.layers.1.{moe}.experts.3.gate_proj.weight"].dtype == torch.int8
        return
    assert {other for other in ours if not other.endswith("weight_scale")} == set(theirs)
    eight = [other for other, tensor in ours.items() if tensor.dtype == torch.int8 and ".experts." in other]
    assert len(eight) == 2 * 4 * 3
    for other in eight:
        scale = ours[f"{other}_scale"]
        assert scale.shape == (len(theirs[other]), 1)
        assert bool(((ours[other] * scale - theirs[other]).abs() <= scale * 0.5001).all()), other


def test_loaded_is_what_was_saved(int8: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = int8
    assert_loads_and_saves(directory, logits(model), tmp_path)


@pytest.mark.parametrize("scheme", ["fp8", "int8-static", "fp8-static"])
@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])  # stored one by one, and fused
def test_every_scheme_of_experts(name: str, scheme: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model", scheme)
    assert_loads_and_saves(tmp_path / "model", logits(model), tmp_path)


def assert_loads_and_saves(directory: Path, expected: Tensor, tmp_path: Path) -> None:
    loaded = load(directory)
    assert torch.equal(logits(loaded), expected)
    assert len(experts_of(loaded)) == 2
    assert all(experts.is_packed for experts in experts_of(loaded))
    save(loaded, tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), expected)


def test_every_way_in_and_out(int8: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, directory = int8
    expected = logits(model)
    for number, one in enumerate((model, load(directory))):
        one.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(load(tmp_path / str(number))), expected)
    enable()
    try:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), expected)
    finally:
        disable()
    save(model, tmp_path / "sharded", max_shard_size=20_000)
    assert torch.equal(logits(load(tmp_path / "sharded")), expected)
    save(model, tmp_path / "lmdeploy", format="lmdeploy")
    assert torch.equal(logits(load(tmp_path / "lmdeploy")), expected)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3-moe", "granitemoe"])
def test_some_experts_may_stay_in_floating_point(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model", skip=("layers.0.*.experts",))
    assert len(experts_of(model)) == 1
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert len(experts_of(loaded)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantize(tiny.build("qwen2_moe", dtype), CALIBRATION, progress=False)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    wide = load(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(experts_of(wide)[0].gate, experts_of(loaded)[0].gate)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("experts") / "model"
    saved("qwen3_moe", directory)
    return directory


EXPERT = "model.layers.1.mlp.experts.2"
UP = f"{EXPERT}.up_proj.weight", f"{EXPERT}.up_proj.weight_scale"
Tensors = dict[str, Tensor]


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


DAMAGES: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (lambda t: without(t, *UP), f"lacks {EXPERT}.up_proj"),
    (lambda t: without(t, UP[1]), f"{EXPERT}.up_proj.weight_scale is missing"),
    (
        lambda t: t | {f"{EXPERT}.up_proj.weight": t[f"{EXPERT}.up_proj.weight"][:, :-1].contiguous()},
        r"up_proj.weight is \[48, 63\], but config.json makes it \[48, 64\]",
    ),
    (
        lambda t: t | {name.replace(EXPERT, f"{EXPERT[:-1]}4"): t[name].clone() for name in UP},
        "experts.4.up_proj is no layer of an expert that config.json makes",
    ),
    (lambda t: t | {f"{EXPERT}.up_proj.bias": torch.zeros(48)}, "up_proj has a bias, which does not fit"),
    (
        lambda t: without(t, f"{EXPERT}.up_proj.weight_scale") | {f"{EXPERT}.up_proj.weight": torch.zeros(48, 64)},
        f"says {EXPERT}.up_proj is quantized, but its weight is F32",
    ),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES, ids=[sentence for _, sentence in DAMAGES])
def test_damage_is_named(damage: Callable[[Tensors], Tensors], sentence: str, checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(checkpoint, directory)
    save_file(damage(load_file(directory / "model.safetensors")), directory / "model.safetensors")
    with pytest.raises(SmoothQuantError, match=sentence):
        load(directory)


def test_quantized_experts_that_are_not_read_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    # Qwen3-MoE with the activation of a model that we cannot compute.
    directory = tmp_path / "other"
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "relu2"}))
    with pytest.raises(SmoothQuantError, match="Qwen3MoeExperts computes something other than down"):
        load(directory)
