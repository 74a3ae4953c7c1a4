"""compressed-tensors: what is written, what is read, and the sentence for what is not W8A8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smoothquant_ext.checkpoint.formats.compressed_tensors import CompressedTensors
from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES

FORMAT = CompressedTensors()


def int8_config() -> dict[str, Any]:
    return copy.deepcopy(FORMAT.quantization_config({"a": SCHEMES["int8"]}, ["lm_head"]))


def change(path: str, value: Any) -> dict[str, Any]:
    """A valid INT8 configuration with one value changed; ``path`` may start inside the only group."""
    config = int8_config()
    *parents, last = path.split(".")
    in_group = parents or path in ("output_activations", "targets", "weights")
    place = config["config_groups"]["group_0"] if in_group else config
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change("format", "pack-quantized"), "group_0 is stored as 'pack-quantized'"),
        (change("format", "dense"), "group_0 is stored as 'dense'"),
        (change("format", "int-quantized-smoothed"), "group_0 is stored as 'int-quantized-smoothed'"),
        (change("quantization_status", "initialized"), "quantization_status is 'initialized'"),
        (change("transform_config", {"config_groups": {"u": []}}), r"transform_config: u is \[\], expected an object"),
        (change("moe_sparsity_config", {"a": 1}), "moe_sparsity_config is set"),
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
        (change("weights.strategy", "group"), "scaled in blocks, which is not W8A8 but is read by transformers"),
        (change("weights.strategy", "block"), "scaled in blocks, which is not W8A8 but is read by transformers"),
        (change("weights.strategy", "tensor_group"), "weight scales per tensor_group"),
        (change("input_activations.strategy", "group"), "scaled in blocks"),
        (change("input_activations.strategy", "channel"), "dynamic activation scales per channel"),
        (change("input_activations.dynamic", False), "static activation scales per token"),
        (change("input_activations.dynamic", "local"), "activation scales per token"),
    ],
)
def test_configurations_that_are_not_w8a8_are_named(config: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=rf"^dir/config\.json.*{message}.*; quantize the original model with"):
        parse_quantization_config(config, "dir/config.json")


def test_float_activations_are_symmetric() -> None:
    config = FORMAT.quantization_config({"a": SCHEMES["fp8"]}, [])
    config["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    with pytest.raises(SmoothQuantError, match="asymmetric float input_activations"):
        parse_quantization_config(config, "config.json")


def test_weights_without_activations_are_not_w8a8() -> None:
    config = int8_config()
    config["config_groups"]["group_0"]["input_activations"] = None
    with pytest.raises(
        SmoothQuantError, match=r"only the weights have 8 bits \(W8A16\), which is read by transformers"
    ):
        parse_quantization_config(config, "config.json")


def test_configurations_of_other_tools() -> None:
    # An older name for the format, a regular expression as target and as exception, null entries.
    config = int8_config() | {"format": "naive-quantized", "ignore": ["re:.*lm_head"], "kv_cache_scheme": None}
    config["config_groups"]["group_0"]["targets"] = [r"re:.*\.(q|k)_proj$"]
    quantization = parse_quantization_config(config, "config.json")
    assert quantization.scheme_of("model.layers.3.k_proj") is SCHEMES["int8"]
    assert quantization.scheme_of("model.layers.3.o_proj") is None
    assert quantization.scheme_of("model.lm_head") is None

    # Combinations that have no preset.
    scheme = parse_quantization_config(change("weights.strategy", "tensor"), "config.json").scheme_of("a")
    assert scheme is not None
    assert (scheme.dtype, scheme.weight, scheme.activation) == (torch.int8, "tensor", "token")


def test_asymmetric_activations_are_another_scheme() -> None:
    scheme = parse_quantization_config(change("input_activations.symmetric", False), "config.json").scheme_of("a")
    assert scheme is not None
    assert (scheme.name, scheme.symmetric, scheme.activation) == ("int8-asymmetric", False, "token")
    written = FORMAT.quantization_config({"a": scheme}, ["lm_head"])
    assert parse_quantization_config(written, "config.json").scheme_of("a") == scheme


def test_omitted_strategies_have_the_defaults_of_compressed_tensors() -> None:
    config = int8_config()
    group = config["config_groups"]["group_0"]
    group["weights"]["strategy"] = group["input_activations"]["strategy"] = None
    scheme = parse_quantization_config(config, "config.json").scheme_of("a")
    assert scheme is not None
    assert (scheme.weight, scheme.activation) == ("tensor", "token")
    # One dynamic scale for a whole batch becomes one per token.
    quantization = parse_quantization_config(change("input_activations.strategy", "tensor"), "config.json")
    assert quantization.scheme_of("a") is SCHEMES["int8"]


def test_an_8_bit_cache_is_noted() -> None:
    (note,) = parse_quantization_config(change("kv_cache_scheme", {"num_bits": 8}), "config.json").notes
    assert "cache of keys and values is kept in floating point" in note


def test_the_configuration_that_other_engines_expect() -> None:
    common = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    assert FORMAT.quantization_config({"a": SCHEMES["int8-static"]}, ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | {"strategy": "channel"},
                "input_activations": common | {"strategy": "tensor"},
            }
        },
    }


def test_mixed_schemes_name_their_layers() -> None:
    schemes = {"q": SCHEMES["int8"], "k": SCHEMES["int8"], "down": SCHEMES["int8-static"]}
    config = FORMAT.quantization_config(schemes, [])
    assert config["format"] == "int-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["q", "k"], ["down"]]
    quantization = parse_quantization_config(config, "config.json")
    assert {name: quantization.scheme_of(name) for name in schemes} == schemes
    assert quantization.scheme_of("up") is None

    schemes["down"] = SCHEMES["fp8"]
    config = FORMAT.quantization_config(schemes, [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized", "float-quantized"]
    quantization = parse_quantization_config(config, "config.json")
    assert {name: quantization.scheme_of(name) for name in schemes} == schemes


@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES.values() if scheme.dtype in FORMAT.dtypes], ids=lambda scheme: scheme.name
)
def test_compressed_tensors_itself_accepts_the_configuration(scheme: Any) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = FORMAT.quantization_config({"a": scheme}, ["lm_head"])
    parsed = quantization.QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.strategy) == (8, scheme.weight)
