"""What other programs do with our checkpoints without us, as README.md, docs/ and model cards say it.

These tests hold for the installed versions. One that fails says that a sentence there has aged: see docs/engines.md,
docs/experts.md and the ``how_to_run`` of the formats.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_w8a8 import quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from smoothquant_ext import Recipe, disable, quantize, save
from smoothquant_ext.scheme import SCHEMES

IDS = tiny.token_ids()
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _without_us() -> None:
    disable()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


def weight(model: PreTrainedModel) -> Tensor:
    layer = model.get_submodule(LAYER)
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().clone()


def oracle(directory: Path, dynamic: bool | None) -> PreTrainedModel:
    """The model in fp32 with dequantized weights; its layers' inputs are rounded to 8 bits and back, in plain torch.

    ``dynamic``: by a scale per token, or the stored one; ``None``: inputs are not rounded.
    """
    tensors = load_file(directory / "model.safetensors")
    model = tiny.build("llama")
    for name, layer in model.named_modules():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if "weight_scale" in own:
            assert isinstance(layer, nn.Linear)
            layer.weight.data = own["weight"].float() * own["weight_scale"]
            if dynamic is not None:
                scale = None if dynamic else own["input_scale"]
                layer.register_forward_pre_hook(functools.partial(rounded, dtype=own["weight"].dtype, scale=scale))
        elif name and "weight" in own:
            layer.load_state_dict(own)
    return model


def rounded(_: nn.Module, args: tuple[Tensor], dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor]:
    """The input of a layer, rounded as compressed-tensors does: its INT8 is [-128, 127], a scale the mean of both."""
    (x,), is_int8 = args, dtype == torch.int8
    low, high = (-128, 127) if is_int8 else (-448, 448)
    if scale is None:
        scale = x.abs().amax(-1, keepdim=True) * 2 / (high - low)
    steps = (x / scale).clamp(low, high)
    return ((steps.round() if is_int8 else steps.to(dtype).float()) * scale,)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static"])
def test_transformers_dequantizes_in_the_first_call(scheme: str, tmp_path: Path) -> None:
    save(quantized(scheme=scheme), tmp_path / "mine")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    assert type(theirs.get_submodule(LAYER)) is nn.Linear
    assert weight(theirs).dtype == SCHEMES[scheme].dtype
    output = logits(theirs)
    assert weight(theirs).dtype == torch.float32
    expected = oracle(tmp_path / "mine", dynamic=not SCHEMES[scheme].is_static)
    torch.testing.assert_close(weight(theirs), weight(expected))
    torch.testing.assert_close(output, logits(expected))


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static"])
def test_transformers_dequantizes_while_loading_if_asked_to(scheme: str, tmp_path: Path) -> None:
    save(quantized(scheme=scheme), tmp_path / "mine")
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", quantization_config=config)
    expected = oracle(tmp_path / "mine", dynamic=None)
    torch.testing.assert_close(weight(theirs), weight(expected))
    torch.testing.assert_close(logits(theirs), logits(expected))


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "int8", "int8-static"])
def test_transformers_keeps_fp8_only_and_only_where_a_device_has_it(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(quantized(scheme=scheme), tmp_path / "mine")

    def load_optimized() -> Any:
        config = CompressedTensorsConfig(use_optimized_inference=True)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "mine", quantization_config=config, device_map="cpu")

    if not torch.cuda.is_available():
        assert type(load_optimized().get_submodule(LAYER)) is nn.Linear
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)  # torch has these FP8 products on the CPU, too
    theirs = load_optimized()
    is_fp8 = SCHEMES[scheme].dtype == torch.float8_e4m3fn
    assert type(theirs.get_submodule(LAYER)).__name__ == ("CompressedTensorsFP8Linear" if is_fp8 else "Linear")
    output = logits(theirs)
    assert weight(theirs).dtype == (torch.float8_e4m3fn if is_fp8 else torch.float32)
    dynamic = is_fp8 or not SCHEMES[scheme].is_static
    torch.testing.assert_close(output, logits(oracle(tmp_path / "mine", dynamic)))


@pytest.mark.parametrize(
    ("model_type", "scheme", "outcome"),
    [
        ("mixtral", "int8", "fails"),
        ("qwen3_moe", "int8", "fails"),
        ("mixtral", "fp8", "loads"),
        ("qwen3_moe", "fp8", "loads"),
        ("llama4_text", "int8", "loads"),
        ("granitemoe", "int8", "random"),
        ("granitemoe", "fp8", "random"),
    ],
)
def test_transformers_and_experts(model_type: str, scheme: str, outcome: str, tmp_path: Path) -> None:
    model = quantize(tiny.build(model_type), [IDS], Recipe(scheme), progress=False)
    save(model, tmp_path / "mine")
    if outcome == "fails":
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
        return
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", output_loading_info=True)
    missing = {name for name in info["missing_keys"] if "experts" in name}
    experts = {name for name, _ in theirs.named_parameters() if "experts" in name and "shared" not in name}
    assert missing == (experts if outcome == "random" else set())


def test_transformers_refuses_explicit_smoothing(tmp_path: Path) -> None:
    save(quantize(tiny.build("gpt2"), [IDS], Recipe(explicit=True), progress=False), tmp_path / "mine")
    with pytest.raises(ValueError, match="quantization_status"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "mine")


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-e5m2"])
def test_transformers_loses_the_scales_of_lmdeploy(scheme: str, tmp_path: Path) -> None:
    save(quantized(scheme=scheme), tmp_path / "mine", format="lmdeploy")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", output_loading_info=True)
    assert f"{LAYER}.scale" in info["unexpected_keys"]
    stored = load_file(tmp_path / "mine" / "model.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(weight(theirs), stored.float())
