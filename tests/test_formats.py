"""The table of formats: what we write reads back as the same schemes, and everything else is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.formats import FORMATS, choose_format, parse_quantization_config, quantization_config
from smoothquant_ext.scheme import SCHEMES

COMPRESSED, LMDEPLOY = FORMATS["compressed-tensors"], FORMATS["lmdeploy"]
STORABLE = [
    (fmt, scheme)
    for fmt in FORMATS.values()
    for scheme in SCHEMES.values()
    if scheme.dtype in fmt.dtypes and not (scheme.is_static and fmt.input_scale is None)
]


@pytest.mark.parametrize(("fmt", "scheme"), STORABLE, ids=lambda item: item.name)
def test_what_is_written_reads_back(fmt: Any, scheme: Any) -> None:
    layers = ["model.layers.0.q_proj", "model.layers.0.down_proj"]
    config = quantization_config(fmt, dict.fromkeys(layers, scheme), ["lm_head"])
    layout = parse_quantization_config(config, "config.json")
    assert layout.fmt is fmt
    assert [layout.scheme_of(layer) for layer in layers] == [scheme, scheme]
    assert layout.scheme_of("lm_head") is None
    assert layout.ignores("lm_head")


def test_the_configuration_that_other_engines_expect() -> None:
    assert quantization_config(COMPRESSED, {"a": SCHEMES["int8-static"]}, ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "tensor",
                    "dynamic": False,
                },
            }
        },
    }
    assert quantization_config(LMDEPLOY, {"a": SCHEMES["fp8-e5m2"]}, ["lm_head"]) == {
        "quant_method": "smooth_quant",
        "quant_dtype": "float8_e5m2",
        "modules_to_not_convert": ["lm_head"],
    }


def test_mixed_schemes_name_their_layers() -> None:
    schemes = {"q": SCHEMES["int8"], "k": SCHEMES["int8"], "down": SCHEMES["int8-static"]}
    config = quantization_config(COMPRESSED, schemes, [])
    assert config["format"] == "int-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["q", "k"], ["down"]]
    layout = parse_quantization_config(config, "config.json")
    assert {name: layout.scheme_of(name) for name in schemes} == schemes
    assert layout.scheme_of("up") is None

    schemes["down"] = SCHEMES["fp8"]
    config = quantization_config(COMPRESSED, schemes, [])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized", "float-quantized"]
    layout = parse_quantization_config(config, "config.json")
    assert {name: layout.scheme_of(name) for name in schemes} == schemes


def test_compressed_tensors_itself_accepts_the_configuration() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for fmt, scheme in STORABLE:
        if fmt is COMPRESSED:
            config = quantization_config(fmt, {"a": scheme}, ["lm_head"])
            parsed = quantization.QuantizationConfig.model_validate(config)
            weights = parsed.config_groups["group_0"].weights
            assert (weights.num_bits, weights.strategy) == (8, scheme.weight)


def test_format_is_chosen_by_dtype() -> None:
    assert choose_format(None, [SCHEMES["int8"]]) is COMPRESSED
    assert choose_format(None, [SCHEMES["fp8-static"]]) is COMPRESSED
    assert choose_format(None, [SCHEMES["fp8-e5m2"]]) is LMDEPLOY
    assert choose_format("lmdeploy", [SCHEMES["int8"]]) is LMDEPLOY


@pytest.mark.parametrize(
    ("name", "schemes", "message"),
    [
        ("gguf", ["int8"], "unknown format 'gguf', expected one of compressed-tensors, smoothquant-ext, lmdeploy"),
        ("compressed-tensors", ["fp8-e5m2"], r"cannot store scheme 'fp8-e5m2' \(float8_e5m2\); use format 'lmdeploy'"),
        ("lmdeploy", ["int8-static"], "has no static activation scales, which scheme 'int8-static' needs"),
        ("lmdeploy", ["int8", "fp8"], "one quant_dtype for all layers"),
        (None, ["fp8-e5m2", "fp8-static"], "has no static activation scales"),
    ],
)
def test_formats_that_cannot_store_a_scheme(name: str | None, schemes: list[str], message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        choose_format(name, [SCHEMES[scheme] for scheme in schemes])


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
        ({"quant_method": "awq", "bits": 4}, "quantized with 'awq', which is not W8A8"),
        ({"bits": 4}, "quantized with None"),
        ({"quant_method": "smooth_quant", "quant_dtype": "int4"}, "quant_dtype 'int4' is not an 8-bit dtype"),
        (change("format", "pack-quantized"), "group_0 is stored as 'pack-quantized'"),
        (change("format", "dense"), "group_0 is stored as 'dense'"),
        (change("quantization_status", "frozen"), "quantization_status is 'frozen'"),
        (change("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is set"),
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
        (change("input_activations.symmetric", False), "asymmetric input_activations"),
        (change("weights.strategy", "group"), "weight scales per group"),
        (change("weights.strategy", "block"), "weight scales per block"),
        (change("input_activations.strategy", "group"), "dynamic activation scales per group"),
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
