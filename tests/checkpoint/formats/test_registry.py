"""The list of formats: what is written reads back, what cannot be stored is refused, another format is one entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import complaint
from safetensors.torch import load_file, save_file
from tiny_w8a8 import assert_same_model, config_of, quantized

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.formats import registry
from smoothquant_ext.checkpoint.formats.base import LAYERS, Format, QuantizationMap, TensorNames, all_linears
from smoothquant_ext.checkpoint.formats.registry import choose_format, parse_quantization_config, written_formats
from smoothquant_ext.checkpoint.model_card import CARD
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES, Scheme, scheme_of

WRITTEN = written_formats()
STORABLE = [
    (fmt, scheme)
    for fmt in WRITTEN.values()
    for scheme in SCHEMES.values()
    if not fmt.cannot_store([scheme], explicit=False)
]


@pytest.mark.parametrize(("fmt", "scheme"), STORABLE, ids=lambda item: item.name)
def test_what_is_written_reads_back(fmt: Format, scheme: Scheme) -> None:
    layers = ["model.layers.0.q_proj", "model.layers.0.down_proj"]
    config = fmt.quantization_config(dict.fromkeys(layers, scheme), ["lm_head"])
    quantization = parse_quantization_config(config, "config.json")
    assert quantization.fmt is fmt
    assert [quantization.scheme_of(layer) for layer in layers] == [scheme, scheme]
    assert quantization.scheme_of("lm_head") is None
    assert quantization.ignores("lm_head")


def test_every_written_format_says_who_reads_it_and_what_runs_it() -> None:
    assert list(WRITTEN) == ["compressed-tensors", "lmdeploy", "smoothquant-ext"]
    assert all(fmt.read_by and fmt.how_to_run for fmt in WRITTEN.values())
    assert {scheme for _, scheme in STORABLE} == set(SCHEMES.values())


def test_the_first_format_that_can_store_the_model_is_chosen() -> None:
    def chosen(name: str | None, *schemes: str, explicit: bool = False) -> str:
        return choose_format(name, [SCHEMES[scheme] for scheme in schemes], explicit).name

    assert chosen(None, "int8") == "compressed-tensors"
    assert chosen(None, "fp8-static", "int8") == "compressed-tensors"
    assert choose_format(None, [SCHEMES["int8"]], rotated=[LAYERS]).name == "smoothquant-ext", "others may not rotate"
    assert chosen(None, "int8", explicit=True) == "smoothquant-ext"
    assert chosen(None, "fp8-e5m2") == "lmdeploy"
    assert chosen("lmdeploy", "int8") == "lmdeploy"


@pytest.mark.parametrize(
    ("name", "schemes", "explicit", "message"),
    [
        ("gguf", ["int8"], False, "'gguf', expected one of compressed-tensors, lmdeploy, smoothquant-ext$"),
        ("fp8", ["fp8"], False, "unknown format 'fp8', expected one of"),
        (
            "compressed-tensors",
            ["fp8-e5m2"],
            False,
            r"cannot store scheme 'fp8-e5m2' \(float8_e5m2\); use format 'lmdeploy' or another recipe",
        ),
        (
            "lmdeploy",
            ["int8-static"],
            False,
            "has no static activation scales, which scheme 'int8-static' needs; use format 'compressed-tensors'",
        ),
        (
            "lmdeploy",
            ["int8", "fp8"],
            False,
            "one quant_dtype for all layers, and these have float8_e4m3fn and int8; use format 'compressed-tensors'",
        ),
        (
            "lmdeploy",
            ["int8"],
            True,
            "'lmdeploy' has no place for explicit smoothing scales; use format 'smoothquant-ext' or another recipe",
        ),
        (
            None,
            ["fp8-e5m2", "fp8-static"],
            False,
            "'compressed-tensors' cannot store .*'lmdeploy' has no static activation scales.*; use another recipe$",
        ),
    ],
)  # fmt: skip
def test_formats_that_cannot_store_a_model(name: str | None, schemes: list[str], explicit: bool, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        choose_format(name, [SCHEMES[scheme] for scheme in schemes], explicit)


def test_asymmetric_activations_need_a_zero_point() -> None:
    scheme = Scheme("mine", torch.int8, "channel", "token", 0.5, symmetric=False)
    with pytest.raises(SmoothQuantError, match="'lmdeploy' has symmetric activations only, and scheme 'mine' has not"):
        choose_format("lmdeploy", [scheme])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("yes", "quantization_config is 'yes', expected an object"),
        (
            {"quant_method": "awq", "bits": 4},
            "AWQ: weights only, in 4 bits, read by vLLM, SGLang and transformers, which is not",
        ),
        ({"quant_method": "something new"}, "quantized with 'something new', which is not W8A8"),
        ({"bits": 4}, "no quant_method, only bits, so it cannot be told"),
    ],
)
def test_other_methods_are_named(config: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=rf"^dir/config\.json.*{message}.*; quantize the original model with"):
        parse_quantization_config(config, "dir/config.json")


class Toy(Format):
    """Everything that one more format takes: names, a parser, a writer."""

    name = "toy"
    quant_method = "toy_w8a8"
    tensors = TensorNames("w_step", input_scale="x_step")
    dtypes = (torch.int8,)
    read_by = "toys"
    how_to_run = "Wind up {name}."

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        scheme = scheme_of(torch.int8, "channel", "tensor" if config["static"] else "token")
        return QuantizationMap(self, all_linears(scheme), tuple(config["floats"]), complete=True)

    def quantization_config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        static = any(scheme.is_static for scheme in schemes.values())
        return {"quant_method": self.quant_method, "static": static, "floats": list(ignore)}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The entry that one more format takes."""
    fmt = Toy()
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, fmt))
    return fmt


@pytest.mark.parametrize(("model_type", "scheme"), [("qwen2", "int8"), ("qwen2", "int8-static"), ("gpt2", "int8")])
def test_one_more_format_is_one_entry(model_type: str, scheme: str, toy: Toy, tmp_path: Path) -> None:
    model = quantized(model_type, scheme)
    saving.save(model, tmp_path / "model", format="toy")
    assert config_of(tmp_path / "model")["quantization_config"]["quant_method"] == "toy_w8a8"
    suffixes = {name.rpartition(".")[2] for name in load_file(tmp_path / "model" / "model.safetensors")}
    assert suffixes == {"weight", "bias", "w_step", *(["x_step"] if scheme == "int8-static" else [])}
    assert "Wind up model." in (tmp_path / "model" / CARD).read_text()
    assert_same_model(loading.load(tmp_path / "model"), model)
    saving.save(quantized(model_type, scheme), tmp_path / "model", format="compressed-tensors")  # it may be replaced


def test_one_more_format_has_the_same_errors_and_a_place_on_the_command_line(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match=r"format 'toy' cannot store scheme 'fp8' \(float8_e4m3fn\)"):
        choose_format("toy", [SCHEMES["fp8"]])
    refused = complaint("convert", tmp_path, "-o", tmp_path / "out", "--format", "gguf")
    assert refused == "--format is 'gguf', expected one of auto, compressed-tensors, lmdeploy, smoothquant-ext, toy"
    saving.save(quantized("llama"), tmp_path / "model", format="toy")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.0.mlp.up_proj.w_step"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"up_proj\.weight is I8 but .*up_proj\.w_step is missing"):
        loading.load(tmp_path / "model")
