"""The table of formats: what we write reads back as the same schemes, and what a format cannot store is refused."""

from __future__ import annotations

from typing import Any

import pytest

from smoothquant_ext.checkpoint.formats.base import FORMATS, choose_format, quantization_config
from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
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
