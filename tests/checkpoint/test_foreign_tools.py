"""Checkpoints of SGLang, Ascend's msModelSlim, AMD Quark and ModelOpt, and what is W8A8 only if that is asked for."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import torch
from command_line import complaint, smoothquant
from safetensors.torch import load_file, save_file
from tiny_text import tiny_tokenizer
from torch import nn

from smoothquant_ext import load
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.checkpoint.reading import find_quantization
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.models import load_model

BOTH = ("weight_scale", "input_scale")
DYNAMIC = ("weight_scale", None)


def quark(dtype: str, weight: str, inputs: str, is_dynamic: bool) -> dict[str, Any]:
    """A configuration as AMD Quark exports it."""
    common = {"dtype": dtype, "symmetric": True, "group_size": None}
    return {
        "quant_method": "quark",
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {
            "weight": common | {"qscheme": weight, "is_dynamic": False},
            "input_tensors": common | {"qscheme": inputs, "is_dynamic": is_dynamic},
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
    }


# The configuration, the names of scales, whether weights have a scale per channel, the dtype, the scheme.
TOOLS: dict[str, tuple[dict[str, Any], tuple[str, str | None], bool, torch.dtype, str]] = {
    "w8a8_int8": ({"quant_method": "w8a8_int8", "ignore": ["lm_head"]}, DYNAMIC, True, torch.int8, "int8"),
    "w8a8_int8 bare": ({"quant_method": "w8a8_int8", "ignore": None}, DYNAMIC, True, torch.int8, "int8"),
    "w8a8_fp8": ({"quant_method": "w8a8_fp8"}, DYNAMIC, True, torch.float8_e4m3fn, "fp8"),
    "quark int8": (quark("int8", "per_channel", "per_tensor", False), BOTH, True, torch.int8, "int8-static"),
    "quark fp8": (quark("fp8_e4m3", "per_tensor", "per_tensor", False), BOTH, False, torch.float8_e4m3fn, "fp8-static"),
    "quark ptpc": (quark("fp8_e4m3", "per_channel", "per_channel", True), DYNAMIC, True, torch.float8_e4m3fn, "fp8"),
    "modelopt_fp8": (
        {"quant_method": "modelopt_fp8", "quant_algo": "FP8"},
        BOTH,
        False,
        torch.float8_e4m3fn,
        "fp8-static",
    ),
}


def assert_loaded(model: nn.Module, dequantized: foreign.Weights, scheme: str) -> None:
    """The layers are those that were written, to the bit, in one scheme."""
    layers = quantized_layers(model)
    assert set(layers) == set(dequantized)
    assert {layer.scheme.name for layer in layers.values()} == {scheme}
    for name, layer in layers.items():
        weight = layer.plain_weight().float() * layer._plain_scale()
        torch.testing.assert_close(weight, dequantized[name], rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def assert_near(model: nn.Module, original: nn.Module) -> None:
    with torch.no_grad():
        ours, theirs = model(foreign.IDS).logits, original(foreign.IDS).logits
    assert (ours - theirs).norm() < 0.15 * theirs.norm()


@pytest.mark.parametrize("tool", TOOLS)
def test_formats_of_other_tools(tool: str, tmp_path: Path) -> None:
    config, names, per_channel, dtype, scheme = TOOLS[tool]
    model = tiny.build("llama")
    dequantized = foreign.write_fp8(model, tmp_path / "model", config, names, per_channel, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "model")
    assert_loaded(loaded, dequantized, scheme)
    assert_near(loaded, model)


def test_a_mixture_of_modelopts_algorithms(tmp_path: Path) -> None:
    model = tiny.build("llama")
    layers = {name: {"quant_algo": "FP8"} for name in foreign.linears_of(model)}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    dequantized = foreign.write_fp8(model, tmp_path / "model", config, BOTH, False)
    assert_loaded(load(tmp_path / "model"), dequantized, "fp8-static")
    down = next(name for name in layers if "down" in name)
    layers[down] = {"quant_algo": "NVFP4", "group_size": 16}
    change_config(tmp_path / "model", {"quantization_config": config})
    with pytest.raises(SmoothQuantError, match=rf"{down} with quant_algo 'NVFP4' has 4-bit weights .* read by vLLM"):
        load(tmp_path / "model")


# Ascend.


def write_ascend(directory: Path, announced: object = None, kind: str = "W8A8_DYNAMIC") -> foreign.Weights:
    """A checkpoint of msModelSlim, with the file that describes it; its dequantized weights."""
    dequantized = foreign.write_fp8(tiny.build("llama"), directory, {}, DYNAMIC, True, torch.int8)
    change_config(directory, {"quantization_config": announced})
    tensors = load_file(directory / "model.safetensors")
    described = {"model_quant_type": kind, "version": "1.0.0", "group_size": 0}
    for name in list(tensors):
        layer, _, suffix = name.rpartition(".")
        described[name] = kind if layer in dequantized else "FLOAT"
        if suffix == "weight_scale":
            tensors[f"{layer}.weight_offset"] = torch.zeros_like(tensors[name])
            described[f"{layer}.weight_offset"] = kind
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "quant_model_description.json").write_text(json.dumps(described))
    return dequantized


def change_config(directory: Path, values: dict[str, Any]) -> None:
    """Sets values of config.json; ``None`` removes them."""
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("announced", [None, {"quant_method": "ascend"}, {"model_quant_type": "W8A8_DYNAMIC"}])
def test_ascend(announced: object, tmp_path: Path) -> None:
    dequantized = write_ascend(tmp_path / "model", announced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "model")
    assert_loaded(loaded, dequantized, "int8")
    assert_near(loaded, tiny.build("llama"))


def test_ascend_says_what_it_is_where_it_is_not_read(tmp_path: Path) -> None:
    write_ascend(tmp_path / "static", kind="W8A8")
    with pytest.raises(
        SmoothQuantError, match="has static activations in tensors of msModelSlim's own, which is read by"
    ):
        load(tmp_path / "static")
    write_ascend(tmp_path / "four", kind="W4A8_DYNAMIC")
    with pytest.raises(
        SmoothQuantError, match="weights of the kind W4A8_DYNAMIC, which is not W8A8 but is read by vLLM"
    ):
        load(tmp_path / "four")
    write_ascend(tmp_path / "lost", {"quant_method": "ascend"})
    (tmp_path / "lost" / "quant_model_description.json").unlink()
    with pytest.raises(SmoothQuantError, match=r"names no layer, expected quant_model_description\.json beside it"):
        load(tmp_path / "lost")
    write_ascend(tmp_path / "offset")
    tensors = load_file(tmp_path / "offset" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_offset"] += 1
    save_file(tensors, tmp_path / "offset" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"up_proj\.weight_offset is not zero, expected symmetric quantization"):
        load(tmp_path / "offset")


# Models that are in floating point, whatever quantization_config says.

CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ATTENTION = {"targets": ["LlamaAttention"], "weights": None, "input_activations": CACHE}
FLOAT_CONFIGS = {
    "cache": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": CACHE},
        "the cache of keys",
    ),
    "attention": (
        {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": ATTENTION}},
        "group_0 quantizes no weights, only inputs of LlamaAttention",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, "the cache of keys"),
    "nothing": ({}, "quantization_config is empty"),
}


@pytest.mark.parametrize("kind", FLOAT_CONFIGS)
def test_a_model_without_quantized_weights_is_one_in_floating_point(kind: str, tmp_path: Path) -> None:
    config, sentence = FLOAT_CONFIGS[kind]
    model = tiny.build("llama")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, {"quantization_config": config})
    with pytest.warns(UserWarning, match=sentence):
        loaded, _ = load_model(tmp_path)
    assert not quantized_layers(loaded)
    assert getattr(loaded.config, "quantization_config", None) is None
    with torch.no_grad():
        assert torch.equal(loaded(foreign.IDS).logits, model(foreign.IDS).logits)


def test_no_configuration_is_none(tmp_path: Path) -> None:
    tiny.build("llama").config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": None})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_quantization(tmp_path) is None


# Weights in 8 bits whose activations are in floating point.


def weight_only(kind: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    stored = {"int": "int-quantized", "float": "float-quantized"}[kind]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(("kind", "readers"), [("int", "transformers"), ("float", "vLLM, SGLang and transformers")])
def test_weights_alone_are_run_as_w8a8_only_on_request(kind: str, readers: str, tmp_path: Path) -> None:
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    model = tiny.build("llama")
    dequantized = foreign.write_fp8(model, tmp_path / "model", weight_only(kind), DYNAMIC, True, dtype)
    with pytest.raises(SmoothQuantError, match=rf"only the weights have 8 bits \(W8A16\), which is read by {readers};"):
        load(tmp_path / "model")
    with pytest.warns(UserWarning, match="activations are quantized to 8 bits too, .* the checkpoint does not ask"):
        loaded = load(tmp_path / "model", as_w8a8=True)
    assert_loaded(loaded, dequantized, "int8" if kind == "int" else "fp8")
    assert_near(loaded, model)


def test_convert_takes_weights_alone_on_request(tmp_path: Path) -> None:
    source, target = tmp_path / "model", tmp_path / "out"
    dequantized = foreign.write_fp8(tiny.build("llama"), source, weight_only("int"), DYNAMIC, True, torch.int8)
    tiny_tokenizer().save_pretrained(source)
    assert "run 'smoothquant convert --as-w8a8'" in complaint("convert", source, "-o", target)
    assert not target.exists()
    smoothquant("convert", source, "-o", target, "--as-w8a8")
    assert_loaded(load(target), dequantized, "int8")


def test_an_8_bit_embedding_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    foreign.write_fp8(tiny.build("llama"), directory, {"quant_method": "w8a8_int8"}, DYNAMIC, True, torch.int8)
    tensors = load_file(directory / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors |= {name: torch.ones(tiny.VOCAB, 64, dtype=torch.int8), f"{name}_scale": torch.ones(tiny.VOCAB, 1)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"embed_tokens has the 8-bit weights of an embedding, which is read by"):
        load(directory)
