"""Models of any class come back as what they were, or are not saved."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny_others import OTHERS, build_other, outputs, quantize_other_
from tiny_w8a8 import config_of, same_bits
from torch import nn

import smoothquant_ext
from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.naming import count_quantized
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.models import load_model
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.scheme import SCHEMES


def comes_back(model: Any, name: str, directory: Path, **options: Any) -> Any:
    """Saves and loads a model, and checks that nothing has changed; saves it again, and checks the files."""
    saving.save(model, directory / "first", **options)
    loaded = loading.load(directory / "first")
    assert type(loaded) is type(model)
    assert count_quantized(loaded) == count_quantized(model)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert [key for key in expected if not same_bits(state[key], expected[key])] == []
    for one, other in zip(outputs(loaded, name), outputs(model, name), strict=True):
        assert torch.equal(one, other)
    saving.save(loaded, directory / "second", **options)
    for file in sorted(path.name for path in (directory / "first").iterdir() if path.name != "README.md"):
        assert (directory / "second" / file).read_bytes() == (directory / "first" / file).read_bytes(), file
    return loaded


@pytest.mark.parametrize("name", OTHERS)
def test_every_class_comes_back(name: str, tmp_path: Path) -> None:
    comes_back(quantize_other_(build_other(name)), name, tmp_path)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlavaForConditionalGeneration"])
def test_every_scheme_of_classes_that_are_no_causal_lm(name: str, scheme: str, tmp_path: Path) -> None:
    comes_back(quantize_other_(build_other(name), scheme), name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BertModel", "T5ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = comes_back(quantize_other_(build_other(name, dtype)), name, tmp_path)
    assert loaded.dtype == dtype


def test_shards_and_the_other_format(tmp_path: Path) -> None:
    model = quantize_other_(build_other("BartForConditionalGeneration"))
    loaded = comes_back(model, "BartForConditionalGeneration", tmp_path, format="lmdeploy", max_shard_size="30KB")
    assert len(list((tmp_path / "first").glob("*.safetensors"))) > 3
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.shared.weight


@pytest.mark.parametrize("part", ["language_model", "visual"])
def test_a_part_of_a_model_that_sees(part: str, tmp_path: Path) -> None:
    """With a configuration of its own, as transformers gives it."""
    model = build_other("Qwen2_5_VLForConditionalGeneration").model.get_submodule(part)
    quantize_other_(model)
    saving.save(model, tmp_path / "part")
    loaded = loading.load(tmp_path / "part")
    assert type(loaded) is type(model)
    assert [key for key, value in model.state_dict().items() if not same_bits(loaded.state_dict()[key], value)] == []


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlavaForConditionalGeneration"])
def test_an_output_embedding_in_8_bits(name: str, tmp_path: Path) -> None:
    model = quantize_other_(build_other(name, tie_word_embeddings=True), head=True)
    comes_back(model, name, tmp_path)
    assert config_of(tmp_path / "first")["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_output_embedding_that_would_untie_others(name: str, tmp_path: Path) -> None:
    model = quantize_other_(build_other(name), head=True)
    with pytest.raises(
        SmoothQuantError, match=rf"{name} cannot be saved with lm_head in 8 bits, .*embed_tokens.*leave"
    ):
        saving.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class OwnClass(transformers.LlamaForCausalLM):
    pass


class OwnConfig(transformers.LlamaConfig):
    model_type = "of_my_own"


class OwnModel(transformers.LlamaForCausalLM):
    config_class = OwnConfig


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = OTHERS["LlamaModel"][1]
    own_class = quantize_other_(OwnClass(transformers.LlamaConfig(**settings)))
    own_config = quantize_other_(OwnModel(OwnConfig(**settings)))
    for model, reason in (
        (own_class, "OwnClass cannot be saved, .*: transformers has no class of that name for its configuration"),
        (own_config, "OwnModel cannot be saved, .*OwnConfig, is not one that transformers finds by its model_type"),
        (tiny.build("llama"), "LlamaForCausalLM has no quantized layer"),
    ):
        with pytest.raises(SmoothQuantError, match=reason):
            saving.save(model, tmp_path / "model")
    plain: Any = nn.Sequential(nn.Linear(8, 8))
    convert_(plain, ["0"], {"0": torch.ones(8)}, SCHEMES["int8"])
    with pytest.raises(SmoothQuantError, match="Sequential is no model of transformers"):
        saving.save(plain, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_transformers_is_told_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {"of_my_own": OwnConfig})
    mapping = transformers.AutoModelForCausalLM._model_mapping
    monkeypatch.setattr(mapping, "_extra_content", {OwnConfig: OwnModel})
    model = quantize_other_(OwnModel(OwnConfig(**OTHERS["LlamaModel"][1])).eval())
    comes_back(model, "LlamaModel", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "'llama', but architectures MistralForCausalLM, .*another type"),
        (
            {"architectures": ["LlamaForSomethingNew"]},
            "class LlamaForSomethingNew, which transformers .* does not have",
        ),
        (
            {"architectures": ["TheirModel"], "auto_map": {"AutoModel": "theirs.TheirModel"}},
            r"class TheirModel, whose code comes with the model \(auto_map\): such code is never run here",
        ),
        ({"model_type": "llama99"}, "model_type 'llama99', which transformers .* does not have; pip install -U"),
        ({"model_type": None}, "has no model_type, which says what the model is; add it there"),
    ],
)
def test_configurations_of_no_class(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saving.save(quantize_other_(build_other("LlamaModel")), tmp_path / "model")
    config = config_of(tmp_path / "model") | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SmoothQuantError, match=message) as caught:
        loading.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForConditionalGeneration", "LlamaModel"])
def test_through_transformers(name: str, tmp_path: Path) -> None:
    """After ``enable`` the class itself loads it, saves it, and another class that lacks tensors is refused."""
    model = quantize_other_(build_other(name))
    saving.save(model, tmp_path / "model")
    smoothquant_ext.enable()
    try:
        loaded = type(model).from_pretrained(tmp_path / "model")
        loaded.save_pretrained(tmp_path / "again")
        other = {
            "BertForSequenceClassification": transformers.BertForMaskedLM,
            "T5ForConditionalGeneration": transformers.T5ForTokenClassification,
            "LlamaModel": transformers.LlamaForCausalLM,
        }[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SmoothQuantError, match=r" lacks \d+ tensors? that its configuration calls for: "):
                other.from_pretrained(tmp_path / "model")
    finally:
        smoothquant_ext.disable()
    for again in (loaded, loading.load(tmp_path / "again")):
        for one, expected in zip(outputs(again, name), outputs(model, name), strict=True):
            assert torch.equal(one, expected)


def test_a_save_over_a_save_of_another_class(tmp_path: Path) -> None:
    for name in ("BertModel", "LlamaModel", "BertModel"):
        saving.save(quantize_other_(build_other(name)), tmp_path / "model")
        assert type(loading.load(tmp_path / "model")).__name__ == name
    assert type(load_model(tmp_path / "model", task="feature-extraction")[0]).__name__ == "BertModel"
