"""Directories that hold no causal LM, or no model: each is called what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from model_files import change_config, said, write
from safetensors.torch import load_file
from tiny_others import build_other
from tiny_w8a8 import assert_same_model

from smoothquant_ext.models import load_model

OTHER_KINDS = {
    "BertModel": " is BertModel, an encoder; name a causal language model",
    "BertForMaskedLM": " is BertForMaskedLM, an encoder; name a causal language model",
    "RobertaForTokenClassification": " is RobertaForTokenClassification, an encoder; name",
    "BartForConditionalGeneration": " is BartForConditionalGeneration, an encoder-decoder; name",
    "T5ForConditionalGeneration": " is T5ForConditionalGeneration, an encoder-decoder; name",
    "LlamaForSequenceClassification": " is LlamaForSequenceClassification; name a causal language model",
    "ViTForImageClassification": " is ViTForImageClassification; name a causal language model",
    "LlavaForConditionalGeneration": " is LlavaForConditionalGeneration; name a causal language model",
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_models_that_are_no_causal_lm(name: str, tmp_path: Path) -> None:
    directory = write(build_other(name), tmp_path / "model")
    assert said(lambda: load_model(directory)).startswith(f"{directory}{OTHER_KINDS[name]}")


@pytest.mark.parametrize("name", ["BertLMHeadModel", "BartForCausalLM"])
def test_decoders_of_those_families_are(name: str, tmp_path: Path) -> None:
    model = build_other(name)
    loaded, _ = load_model(write(model, tmp_path / "model"))
    assert type(loaded) is type(model)
    assert_same_model(loaded, model)


def test_a_model_without_its_output_embedding(tmp_path: Path) -> None:
    tied, untied = tiny.build("gpt2"), tiny.build("llama")
    write(tied.transformer, tmp_path / "tied")
    write(untied.model, tmp_path / "untied")
    with pytest.warns(UserWarning, match="is GPT2Model: read as GPT2LMHeadModel, which takes the token embedding as"):
        loaded, _ = load_model(tmp_path / "tied")
    assert_same_model(loaded, tied)
    with pytest.warns(UserWarning, match="is LlamaModel"):
        assert " lacks 1 tensor that its configuration calls for: lm_head.weight" in said(
            lambda: load_model(tmp_path / "untied")
        )


def test_directories_that_are_no_model(tmp_path: Path) -> None:
    directory = write(tiny.build("llama"), tmp_path / "model")
    weights, config = directory / "model.safetensors", directory / "config.json"

    (directory / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read as JSON" in said(lambda: load_model(directory))
    (directory / "generation_config.json").unlink()

    for dtype in ("float17", 7, "float8_e4m3fn", "int8"):
        original = config.read_text()
        change_config(directory, dtype=dtype)
        expected = f"config.json says dtype {dtype!r}, expected float32, float16 or bfloat16"
        assert expected in said(lambda: load_model(directory))
        config.write_text(original)

    for name, advice in {
        "consolidated.safetensors": "these are Mistral's own names",
        "diffusion.safetensors": "rename it to model.safetensors if it holds the whole model",
        "training_args.bin": "rename it to pytorch_model.bin if it holds the whole model",
        "tf_model.h5": "this is TensorFlow's format",
        "model-q8.gguf": "name that file itself",
    }.items():
        weights.rename(directory / name)
        assert f"has no model.safetensors or model.safetensors.index.json, only {name}; {advice}" in said(
            lambda: load_model(directory)
        )
        (directory / name).rename(weights)

    tensors = load_file(weights)
    weights.unlink()
    assert "has no weights, expected model.safetensors" in said(lambda: load_model(directory))
    torch.save(tensors, directory / "pytorch_model.bin")
    assert_same_model(load_model(directory)[0], tiny.build("llama"))
    tensors.pop("model.norm.weight")
    torch.save(tensors, directory / "pytorch_model.bin")
    assert "lacks 1 tensor that its configuration calls for: model.norm.weight" in said(lambda: load_model(directory))
    torch.save({"path": Path("x")}, directory / "pytorch_model.bin")
    assert "has .bin files that hold more than tensors, and such pickles are never run" in said(
        lambda: load_model(directory)
    )

    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert "holds adapter_config.json, an adapter of PEFT for someone/base; merge it" in said(
        lambda: load_model(directory)
    )


def test_a_tokenizer_of_more_tokens_than_the_model_has(tmp_path: Path) -> None:
    directory = write(tiny.build("llama", vocab_size=90), tmp_path / "model")
    with pytest.warns(UserWarning, match=r"makes ids up to 95 \('w95'\), but the model has embeddings for 90 tokens"):
        load_model(directory)
