"""Directories that hold another model than a causal LM, or none: each is called what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from model_files import change_config, said, write
from safetensors.torch import load_file
from tiny_others import build_other
from tiny_w8a8 import assert_same_model, same_bits

from smoothquant_ext.models import load_model


@pytest.mark.parametrize("name", ["BertModel", "T5ForConditionalGeneration", "LlamaModel"])
def test_models_are_loaded_as_what_they_are(name: str, tmp_path: Path) -> None:
    model = build_other(name)
    loaded, _ = load_model(write(model, tmp_path / "model"))
    assert type(loaded) is type(model)
    expected, state = model.state_dict(), loaded.state_dict()
    assert [key for key in expected if not same_bits(state[key], expected[key])] == []


def test_a_configuration_that_names_no_class(tmp_path: Path) -> None:
    """An encoder is its base model, a decoder a language model; a task says otherwise."""
    directory = write(build_other("BertForMaskedLM"), tmp_path / "bert")
    change_config(directory, architectures=None)
    assert type(load_model(directory, task="fill-mask")[0]).__name__ == "BertForMaskedLM"
    base = write(build_other("BertModel"), tmp_path / "base")
    change_config(base, architectures=None)
    assert type(load_model(base)[0]).__name__ == "BertModel"
    llama = write(tiny.build("llama"), tmp_path / "llama")
    change_config(llama, architectures=None)
    assert type(load_model(llama)[0]).__name__ == "LlamaForCausalLM"


def test_tasks_that_a_model_is_not_for(tmp_path: Path) -> None:
    directory = write(build_other("ViTForImageClassification"), tmp_path / "model")
    assert said(lambda: load_model(directory, task="fill-mask")) == (
        f"{directory} is ViTForImageClassification: transformers has no class of its type for the task fill-mask; "
        "it has one for image-classification, feature-extraction"
    )
    assert said(lambda: load_model(directory, task="poetry")).startswith(
        "there is no task 'poetry', expected one of text-generation, image-text-to-text, "
    )
    bert = write(build_other("BertModel"), tmp_path / "bert")
    with pytest.warns(UserWarning, match="is BertModel: read as BertForMaskedLM"):
        assert " lacks 6 tensors that its configuration calls for: cls.predictions" in said(
            lambda: load_model(bert, task="fill-mask")
        )


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
        loaded, _ = load_model(tmp_path / "tied", task="text-generation")
    assert_same_model(loaded, tied)
    with pytest.warns(UserWarning, match="is LlamaModel"):
        assert " lacks 1 tensor that its configuration calls for: lm_head.weight" in said(
            lambda: load_model(tmp_path / "untied", task="text-generation")
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
