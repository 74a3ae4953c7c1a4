"""Configurations of quantized checkpoints, whoever wrote them: W8A8 is understood, and everything else named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smoothquant_ext.checkpoint.formats.base import FORMATS, quantization_config
from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES

COMPRESSED = FORMATS["compressed-tensors"]


def ct_config() -> dict[str, Any]:
    return copy.deepcopy(quantization_config(COMPRESSED, {"a": SCHEMES["int8"]}, ["lm_head"]))


def change(path: str, value: Any) -> dict[str, Any]:
    """A valid INT8 configuration with one value changed; ``path`` may start inside the only group."""
    config = ct_config()
    *parents, last = path.split(".")
    place = (
        config["config_groups"]["group_0"]
        if parents or path in ("output_activations", "targets", "weights")
        else config
    )
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("yes", "quantization_config is 'yes', expected an object"),
        (
            {"quant_method": "awq", "bits": 4},
            "AWQ: weights only, in 4 bits, read by vLLM and transformers, which is not",
        ),
        ({"quant_method": "something new"}, "quantized with 'something new', which is not W8A8"),
        ({"bits": 4}, "quantized with None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"FP8 weights scaled in blocks of \[128, 128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' has blocks, other bits"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo 'W4A16_AWQ'"),
        ({"quant_method": "smooth_quant", "quant_dtype": "int4"}, "quant_dtype 'int4' is not an 8-bit dtype"),
        (change("format", "pack-quantized"), "group_0 is stored as 'pack-quantized'"),
        (change("format", "dense"), "group_0 is stored as 'dense'"),
        (change("quantization_status", "initialized"), "quantization_status is 'initialized'"),
        (change("transform_config", {"config_groups": {"u": {}}}), "transform_config is set"),
        (change("sparsity_config", {"format": "sparse-24-bitmask"}), "stored as 'sparse-24-bitmask', not dense"),
        (change("config_groups", {}), "no config_groups"),
        (change("config_groups", {"group_0": ["Linear"]}), r"group_0 is \['Linear'\]"),
        (change("weights", 8), "group_0 has weights 8, expected an object"),
        (change("targets", "Linear"), "the targets of group_0 is 'Linear', expected a list"),
        (change("ignore", ["re:("]), r"ignore is \['re:\('\], expected a list"),
        (change("weights.num_bits", 4), "group_0 has 4-bit int weights, expected 8 bits"),
        (change("weights.type", "float"), "mixes int and float"),
        (change("weights.type", "mxfp"), "8-bit mxfp weights"),
        (change("weights.symmetric", False), "asymmetric weights"),
        (change("weights.strategy", "group"), "scaled in blocks, which is not W8A8 but is read by vLLM"),
        (change("weights.strategy", "block"), "scaled in blocks, which is not W8A8 but is read by vLLM"),
        (change("weights.strategy", "tensor_group"), "weight scales per tensor_group"),
        (change("input_activations.strategy", "group"), "scaled in blocks"),
        (change("input_activations.strategy", "channel"), "dynamic activation scales per channel"),
        (change("input_activations.dynamic", False), "static activation scales per token"),
        (change("input_activations.dynamic", "local"), "activation scales per token"),
        (
            change("output_activations", {"num_bits": 8}),
            "quantizes weights and input_activations and output_activations",
        ),
    ],
)
def test_what_is_not_w8a8_is_named(config: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=rf"^dir/config\.json.*{message}.*; quantize the original model with"):
        parse_quantization_config(config, "dir/config.json")


def test_float_activations_are_symmetric() -> None:
    config = quantization_config(COMPRESSED, {"a": SCHEMES["fp8"]}, [])
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    with pytest.raises(SmoothQuantError, match="asymmetric float input_activations"):
        parse_quantization_config(config, "config.json")


def test_weights_without_activations_are_not_w8a8() -> None:
    config = ct_config()
    config["config_groups"]["group_0"]["input_activations"] = None
    with pytest.raises(SmoothQuantError, match="group_0 quantizes weights, expected weights and input_activations"):
        parse_quantization_config(config, "config.json")


def test_what_other_tools_write() -> None:
    # An older compressed-tensors name for the format, a regular expression as target and as exception, null entries.
    config = ct_config() | {"format": "naive-quantized", "ignore": ["re:.*lm_head"], "kv_cache_scheme": None}
    config["config_groups"]["group_0"]["targets"] = [r"re:.*\.(q|k)_proj$"]
    layout = parse_quantization_config(config, "config.json")
    assert layout.scheme_of("model.layers.3.k_proj") is SCHEMES["int8"]
    assert layout.scheme_of("model.layers.3.o_proj") is None
    assert layout.scheme_of("model.lm_head") is None

    # Combinations that have no preset.
    config = ct_config()
    config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    scheme = parse_quantization_config(config, "config.json").scheme_of("a")
    assert scheme is not None
    assert (scheme.dtype, scheme.weight, scheme.activation) == (torch.int8, "tensor", "token")

    # LMDeploy before it had quant_dtype.
    layout = parse_quantization_config({"quant_method": "smooth_quant"}, "config.json")
    assert layout.scheme_of("a") is SCHEMES["int8"]


def test_asymmetric_activations_are_a_scheme_of_their_own() -> None:
    layout = parse_quantization_config(change("input_activations.symmetric", False), "config.json")
    scheme = layout.scheme_of("a")
    assert scheme is not None
    assert (scheme.name, scheme.symmetric, scheme.activation) == ("int8-asymmetric", False, "token")
    written = quantization_config(COMPRESSED, {"a": scheme}, ["lm_head"])
    assert parse_quantization_config(written, "config.json").scheme_of("a") == scheme


def test_omitted_strategies_are_compressed_tensors_defaults() -> None:
    config = ct_config()
    group = config["config_groups"]["group_0"]
    group["weights"]["strategy"] = group["input_activations"]["strategy"] = None
    scheme = parse_quantization_config(config, "config.json").scheme_of("a")
    assert scheme is not None
    assert (scheme.weight, scheme.activation) == ("tensor", "token")
    # One dynamic scale for a whole batch becomes one a token.
    assert (
        parse_quantization_config(change("input_activations.strategy", "tensor"), "x").scheme_of("a") is SCHEMES["int8"]
    )


@pytest.mark.parametrize(
    ("config", "name", "fmt", "suffixes"),
    [
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8", "fbgemm_fp8", ("weight_scale", None)),
        (
            {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
            "fp8-static",
            "fp8",
            ("weight_scale", "input_scale"),
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8-static", "modelopt", ("weight_scale", "input_scale")),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "fp8-static",
            "modelopt",
            ("weight_scale", "input_scale"),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
            "fp8",
            "modelopt",
            ("weight_scale", "input_scale"),
        ),
        ({"quant_method": "smooth_quant", "quant_dtype": "fp8"}, "fp8", "lmdeploy", ("scale", None)),
    ],
)
def test_fp8_of_others(config: Any, name: str, fmt: str, suffixes: tuple[str, str | None]) -> None:
    layout = parse_quantization_config(config, "config.json")
    assert layout.scheme_of("model.layers.0.mlp.up_proj") is SCHEMES[name]
    assert layout.fmt.name == fmt
    assert (layout.fmt.weight_scale, layout.fmt.input_scale) == suffixes


def test_transformers_spells_fp8_differently() -> None:
    layout = parse_quantization_config({"quant_method": "fp8", "activation_scheme": "dynamic"}, "config.json")
    assert layout.spelled_as(["a.weight", "a.weight_scale"]).fmt.weight_scale == "weight_scale"
    assert layout.spelled_as(["a.weight", "a.weight_scale_inv"]).fmt.input_scale == "activation_scale"


@pytest.mark.parametrize(
    "config",
    [
        change("kv_cache_scheme", {"num_bits": 8}),
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"},
    ],
)
def test_an_8_bit_cache_is_noted(config: Any) -> None:
    (note,) = parse_quantization_config(config, "config.json").notes
    assert "cache of keys and values is kept in floating point" in note
