"""W8A8 checkpoints of other tools: the weights are theirs to the bit, and a layer's error that of its activations.

The bound: a layer computes ``y = x @ W.T`` with its input rounded to steps of ``step``. Rounding to nearest moves no
element by more than half a step (for FP8 by 1/16 of itself, its last bit, above the subnormals), and no output by more
than ``sum(|W| * step / 2)``, besides fp32's own rounding of sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.nn.linear import W8A8Linear

EPS = torch.finfo(torch.float32).eps
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "opt": {},  # its head is tied
}


def build(model: str) -> Any:
    return tiny.build(model.removesuffix("-tied"), **MODELS[model])


def dequantized_weight(layer: W8A8Linear) -> Tensor:
    return layer.plain_weight().float() * layer._plain_scale()


def rounding_of_inputs(layer: W8A8Linear, x: Tensor) -> Tensor:
    """How far each element of x [M, K] may be moved by quantizing it, for the scales that the checkpoint asks for."""
    levels = 127.0 if layer.scheme.symmetric else 127.5
    if layer.scheme.is_static:
        assert layer.input_scale is not None
        step = layer.input_scale * (1.0 if layer.scheme.symmetric else 127.5 / 127.0)
        middle = torch.zeros(1) if layer.scheme.symmetric else (-0.5 - layer.input_zero_point) * layer.input_scale
        limit = step * (127 if layer.scheme.dtype == torch.int8 else 448)
        beyond = ((x - middle).abs() - limit).clamp(min=0)  # cut off, where the calibration saw less
    else:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        absmax = x.abs().amax(-1, keepdim=True) if layer.scheme.symmetric else (high - low) / 2
        step = absmax / (levels if layer.scheme.dtype == torch.int8 else 448)
        beyond = torch.zeros(1)
    if layer.scheme.dtype == torch.int8:
        return step.expand_as(x) * 0.5001 + beyond
    return torch.maximum(x.abs() / 16, step * 2.0**-10) * 1.0001 + beyond  # the smallest subnormal is 2**-9


def assert_computes(model: nn.Module, dequantized: dict[str, Tensor], ids: Tensor = foreign.IDS) -> None:
    """Every layer has the weight, and its output is off by no more than the rounding of its input allows."""
    layers = quantized_layers(model)
    assert set(layers) == set(dequantized)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _module, args, y, name=name: calls.update({name: (args[0], y)}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    assert set(calls) == set(layers)
    for name, (x, y) in calls.items():
        layer, weight = layers[name], dequantized[name]
        torch.testing.assert_close(dequantized_weight(layer), weight, rtol=4 * EPS, atol=0)
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        expected = x @ weight.double().T + (0 if layer.bias is None else layer.bias.double())
        bound = rounding_of_inputs(layer, x.float()).double() @ weight.abs().double().T
        size = x.abs() @ weight.abs().double().T + expected.abs()
        assert bool(((y - expected).abs() <= bound + 8 * EPS * size).all()), name
        # The bound can fail: most of it is used somewhere, and rounding did happen.
        assert float(((y - expected).abs() / bound.clamp(min=1e-30)).max()) > 0.02, name


# Every scheme on a model without biases and on one with biases and a tied head; the other models on one scheme.
CASES = [(model, scheme) for model in ("llama", "opt") for scheme in foreign.CT_SCHEMES]
CASES += [(model, "int8-static") for model in MODELS if model not in ("llama", "opt")]


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_compressed_tensors(model: str, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    dequantized = foreign.write_compressed_tensors(build(model), scheme, tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    assert_computes(loaded, dequantized)

    # Saved again and loaded again it is the same, zero points included.
    saving.save(loaded, tmp_path / "again")
    again = loading.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(foreign.IDS).logits, loaded(foreign.IDS).logits)


def test_several_groups_and_patterns(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    common = {"num_bits": 8, "type": "int"}
    dynamic = {
        "targets": [r"re:.*(q|k|v)_proj$"],
        "weights": common | {"strategy": "channel"},
        "input_activations": common | {"strategy": "token", "dynamic": True},
    }
    other = dynamic | {"targets": [r"re:.*mlp\..*"], "weights": common | {"strategy": "tensor"}}
    dequantized = foreign.write_compressed_tensors(
        build("llama"),
        "int8-dynamic",
        tmp_path / "model",
        config_groups={"a": dynamic, "b": other},
        ignore=["re:.*lm_head", r"re:.*layers\.1\.mlp.*"],
    )
    assert not any("o_proj" in name or "layers.1.mlp" in name for name in dequantized)
    loaded = loading.load(tmp_path / "model")
    assert_computes(loaded, dequantized)
    schemes = {layer.scheme.weight for layer in quantized_layers(loaded).values()}
    assert schemes == {"channel", "tensor"}


FP8_OF_OTHERS = {
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        ("weight_scale", None),
        True,
    ),
    "vllm static": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        ("weight_scale", "input_scale"),
        False,
    ),
    "vllm dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ("weight_scale", None), False),
    "transformers static": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        ("weight_scale_inv", "activation_scale"),
        False,
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        ("weight_scale", "input_scale"),
        False,
    ),
    "modelopt per token": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        ("weight_scale", None),
        True,
    ),
}


@pytest.mark.parametrize(
    ("model", "tool"),
    [*(("llama", tool) for tool in FP8_OF_OTHERS), ("qwen2-tied", "vllm static"), ("opt", "vllm static")],
)
def test_fp8_of_others(model: str, tool: str, tmp_path: Path) -> None:
    config, names, per_channel = FP8_OF_OTHERS[tool]
    dequantized = foreign.write_fp8(build(model), tmp_path / "model", config, names, per_channel)
    loaded = loading.load(tmp_path / "model")
    assert_computes(loaded, dequantized)

    # It is saved as compressed-tensors, which every engine reads.
    saving.save(loaded, tmp_path / "again")
    again = loading.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(foreign.IDS).logits, loaded(foreign.IDS).logits)


def test_modelopt_has_another_configuration_file(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    config = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    dequantized = foreign.write_fp8(build("llama"), directory, config, ("weight_scale", "input_scale"), False)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "hf_quant_config.json").write_text(json.dumps(settings.pop("quantization_config")))
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="cache of keys and values is kept in floating point"):
        loaded = loading.load(directory)
    assert_computes(loaded, dequantized)


def test_scales_of_the_cache_are_ignored_with_a_sentence(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    foreign.write_fp8(build("llama"), directory, config, ("weight_scale", "input_scale"), False)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(1)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="1 scales that no layer here uses are left out: 1 k_scale") as caught:
        loading.load(directory)
    assert len(caught) == 1


WRITTEN = sorted(path.name for path in (Path(__file__).parent / "data" / "llmcompressor").iterdir())


@pytest.mark.parametrize("name", WRITTEN)
def test_llmcompressor(name: str, tmp_path: Path) -> None:
    """What llm-compressor itself wrote, see data/write_llmcompressor.py: its weights, and logits as near as its own."""
    directory = Path(__file__).parent / "data" / "llmcompressor" / name
    model = loading.load(directory, dtype=torch.float32)
    layers = quantized_layers(model)
    stored = load_file(directory / "model.safetensors")
    weights = {layer: stored[f"{layer}.weight"].float() * stored[f"{layer}.weight_scale"].float() for layer in layers}
    expected = load_file(directory / "expected.safetensors")
    assert_computes(model, weights, expected["windows"])
    with torch.no_grad():
        ours = model(expected["windows"]).logits
        for layer, weight in weights.items():
            exact = nn.Linear(weight.shape[1], weight.shape[0], bias=layers[layer].bias is not None)
            exact.weight.copy_(weight)
            if exact.bias is not None:
                exact.bias.copy_(layers[layer].bias)
            model.set_submodule(layer, exact)
        unrounded = model(expected["windows"]).logits
    theirs = (expected["logits"] - unrounded).norm()
    assert theirs > 0
    assert (ours - unrounded).norm() < 1.25 * theirs  # twice rounded at random: the norms of thousands of numbers
    assert (ours - unrounded).norm() < 0.1 * unrounded.norm()
