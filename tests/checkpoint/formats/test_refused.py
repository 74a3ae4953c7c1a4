"""What is refused: the sentence says what it is and who reads it, and docs/formats.md says the same."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from smoothquant_ext.checkpoint.formats.ascend import Ascend
from smoothquant_ext.checkpoint.formats.base import FloatWeights
from smoothquant_ext.checkpoint.formats.compressed_tensors import CompressedTensors
from smoothquant_ext.checkpoint.formats.refused import REFUSED
from smoothquant_ext.checkpoint.formats.registry import FORMATS, parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES

PAGE = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
READ, REST = PAGE.split("\n## Refused\n")
METHODS, PARTS = REST.split("\n## Write\n")[0].split("\nOf the formats above")


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of the tables of a page, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [
        row
        for row, following in zip(cells, [*cells[1:], [""]], strict=True)
        if not {row[0][:3], following[0][:3]} & {"---"}
    ]


def compressed_tensors(kind: str = "int8", **parts: Any) -> dict[str, Any]:
    config = copy.deepcopy(CompressedTensors().quantization_config({"a": SCHEMES[kind]}, []))
    config["config_groups"]["group_0"] |= parts
    return config


def in_blocks(kind: str) -> dict[str, Any]:
    config = compressed_tensors(kind)
    config["config_groups"]["group_0"]["weights"]["strategy"] = "block"
    return config


def transforming(location: str, kind: str = "hadamard") -> dict[str, Any]:
    group = {"type": kind, "head_dim": 64, "apply": [{"location": location, "targets": ["Linear"]}]}
    return compressed_tensors() | {"transform_config": {"config_groups": {"u": group}}}


def modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm}


MODELOPT = ("W8A8_SQ_PER_CHANNEL", "W8A16", "MXFP8", "NVFP4", "FP8_PB_WO")
PACKED = {"format": "pack-quantized", "input_activations": None}
PART_CONFIGS: dict[str, Any] = {
    "`compressed-tensors`, INT8 weights alone": compressed_tensors(input_activations=None),
    "`compressed-tensors`, FP8 weights alone": compressed_tensors("fp8", input_activations=None),
    "`compressed-tensors`, `pack-quantized`": compressed_tensors(**PACKED),
    "`compressed-tensors`, FP8 scaled in blocks": in_blocks("fp8"),
    "`compressed-tensors`, INT8 scaled in blocks": in_blocks("int8"),
    "`compressed-tensors`, `random-hadamard` or `random-matrix` at run time": transforming("input", "random-hadamard"),
    "`compressed-tensors`, outputs transformed at run time": transforming("output"),
    "`compressed-tensors`, queries or keys transformed at run time": transforming("k_cache"),
    "`fp8` with `weight_block_size`": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    **{f"`modelopt`, `{name}`": modelopt(name) for name in MODELOPT},
    "`quark`, other dtypes, blocks or several schemes": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4"}, "input_tensors": {"dtype": "fp4"}},
    },
    "`ascend`, `W8A8` with static activations": {"model_quant_type": "W8A8", "a.weight": "W8A8"},
    "`ascend`, other kinds such as `W4A8_DYNAMIC`": {"model_quant_type": "W4A8_DYNAMIC", "a.weight": "W4A8_DYNAMIC"},
}  # fmt: skip


def refused(config: Any) -> str:
    with pytest.raises(SmoothQuantError) as error:
        parse_quantization_config(config, "dir/config.json")
    message = str(error.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message


def test_the_page_lists_every_method_that_is_read() -> None:
    assert {row[0].strip("`") for row in rows(READ)} == {fmt.quant_method for fmt in FORMATS}
    for fmt in FORMATS:
        assert fmt.config_file is None or f"`{fmt.config_file}`" in READ


def test_the_page_lists_every_method_that_is_refused() -> None:
    nobody = "nobody: the files are in floating point"
    expected = [[f"`{method}`", what, readers or nobody] for method, (what, readers) in REFUSED.items()]
    assert rows(METHODS) == expected
    assert not REFUSED.keys() & {fmt.quant_method for fmt in FORMATS}


@pytest.mark.parametrize("method", REFUSED)
def test_a_refused_method_is_named_with_its_readers(method: str) -> None:
    what, readers = REFUSED[method]
    message = refused({"quant_method": method})
    assert what in message
    assert readers in message
    assert ("remove quantization_config" in message) is not bool(readers)
    assert message.endswith(("smoothquant-ext", "instead"))


def test_the_page_lists_the_parts_of_formats_that_are_refused() -> None:
    """The last row is not of a configuration; that error is tested with a checkpoint."""
    assert [row[0] for row in rows(PARTS)] == [*PART_CONFIGS, "8-bit weights of an embedding"]


@pytest.mark.parametrize("part", PART_CONFIGS)
def test_a_refused_part_is_named_with_its_readers(part: str) -> None:
    (readers,) = [row[1] for row in rows(PARTS) if row[0] == part]
    assert f"read by {readers}" in refused(PART_CONFIGS[part])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"bits": 4, "group_size": 64}, "MLX's affine weights in groups, read by mlx-lm"),
        ({"load_in_8bit": True}, "bitsandbytes: weights only, or split by outliers"),
        ({"foo": 1, "bar": 2}, "has no quant_method, only bar, foo, so it cannot be told what it is"),
        ({"quant_method": "mine"}, "quantized with 'mine', which is not W8A8"),
        ({"quant_method": ["awq"]}, r"quantized with \['awq'\]"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
            r"torchao's own kind of tensors \(Int8WeightOnlyConfig\), which are read by vLLM and transformers",
        ),
    ],
)
def test_configurations_that_name_no_known_method(config: Any, sentence: str) -> None:
    assert re.search(sentence, refused(config))


def test_a_configuration_without_method_may_be_that_of_compressed_tensors() -> None:
    config = {key: value for key, value in compressed_tensors().items() if key != "quant_method"}
    assert parse_quantization_config(config, "config.json").scheme_of("a") is SCHEMES["int8"]


HOSTILE = [None, 7, "x", [], [1], {}, {"a": 1}, True]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_values_of_other_types_are_a_sentence(value: Any) -> None:
    """Whatever a value is, the result is a map, a model in floating point, or a sentence."""
    known = [
        compressed_tensors(),
        PART_CONFIGS["`fp8` with `weight_block_size`"],
        modelopt("FP8"),
        {"quant_method": "w8a8_int8"},
    ]
    known += [
        {
            "quant_method": "quark",
            "layer_quant_config": {"*": {}},
            "global_quant_config": {"weight": {}, "input_tensors": {}},
        }
    ]
    known += [
        {"quant_method": "smooth_quant", "quant_dtype": "int8"},
        {"model_quant_type": "W8A8", "a.weight": "W8A8_DYNAMIC"},
    ]
    known += [modelopt("MIXED_PRECISION") | {"quantized_layers": {"a": {"quant_algo": "FP8"}}}]

    def variants(config: Any) -> Any:
        for key in config:
            yield config | {key: value}
            if isinstance(config[key], dict):
                for inner in variants(config[key]):
                    yield config | {key: inner}

    for config in known:
        for changed in variants(config):
            with suppress(SmoothQuantError):
                parse_quantization_config(changed, "config.json").scheme_of("a")


def test_a_cache_alone_quantizes_no_weights() -> None:
    assert issubclass(FloatWeights, SmoothQuantError)
    with pytest.raises(FloatWeights, match="no weights are quantized, and the cache of keys and values is kept in"):
        parse_quantization_config({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "config.json")


def test_the_cache_of_ascend_is_noted() -> None:
    described = {"model_quant_type": "W8A8_DYNAMIC", "a.weight": "W8A8_DYNAMIC", "kv_quant_type": "C8"}
    (note,) = Ascend().parse(described, "config.json").notes
    assert "cache of keys and values" in note
