"""The FP8 configurations of vLLM, transformers, FBGEMM and ModelOpt."""

from __future__ import annotations

from typing import Any

import pytest

from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES

BOTH = ("weight_scale", "input_scale")


@pytest.mark.parametrize(
    ("config", "scheme", "fmt", "suffixes"),
    [
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8", "fbgemm_fp8", ("weight_scale", None)),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}, "fp8-static", "fp8", BOTH),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8-static", "modelopt", BOTH),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
            "fp8-static",
            "modelopt",
            BOTH,
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8", "modelopt", BOTH),
    ],
)  # fmt: skip
def test_configurations_of_each_tool(config: Any, scheme: str, fmt: str, suffixes: tuple[str, str | None]) -> None:
    quantization = parse_quantization_config(config, "config.json")
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") is SCHEMES[scheme]
    assert quantization.fmt.name == fmt
    assert (quantization.fmt.tensors.weight_scale, quantization.fmt.tensors.input_scale) == suffixes
    assert not quantization.complete


def test_transformers_and_vllm_share_a_method_and_differ_in_the_names_of_tensors() -> None:
    fmt = parse_quantization_config({"quant_method": "fp8", "activation_scheme": "dynamic"}, "config.json").fmt
    assert fmt.variant(["a.weight", "a.weight_scale"]).tensors.weight_scale == "weight_scale"
    assert fmt.variant(["a.weight", "a.weight_scale_inv"]).tensors.input_scale == "activation_scale"


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"},
    ],
)
def test_an_8_bit_cache_is_noted(config: Any) -> None:
    (note,) = parse_quantization_config(config, "config.json").notes
    assert "cache of keys and values is kept in floating point" in note


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"FP8 weights scaled in blocks of \[128, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "no"}, "activation_scheme is 'no', expected static or dynamic"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4' has 4-bit weights in blocks of 16"),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo 'W4A16_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, "which is read by TensorRT-LLM only"),
    ],
)  # fmt: skip
def test_configurations_that_are_not_w8a8_are_named(config: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=rf"^dir/config\.json.*{message}"):
        parse_quantization_config(config, "dir/config.json")
