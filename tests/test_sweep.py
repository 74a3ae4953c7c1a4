"""The sweep over the classes of transformers: how it shrinks configurations, and a few of its classes."""

from __future__ import annotations

from typing import Any

import pytest
import sweep
import torch
import transformers
from transformers import CONFIG_MAPPING

CLASSES = {
    "BertForSequenceClassification": "bert",
    "BloomForCausalLM": "bloom",
    "CLIPModel": "clip",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "T5ForConditionalGeneration": "t5",
    "ViTForImageClassification": "vit",
    "Wav2Vec2ForCTC": "wav2vec2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_class(name: str) -> None:
    record = sweep.try_class(name, CLASSES[name])
    assert record["outcome"] == "works", record
    assert record["layers"] > 1


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("LlamaForCausalLM", 2),
        ("Gemma3ForConditionalGeneration", 2),  # settings in settings; two kinds of attention
        ("Qwen3NextForCausalLM", 2),  # a mixture of experts, and layers of two kinds, of which each fourth is the other
    ],
)
def test_tiny_models(name: str, kinds: int) -> None:
    types = {each: model_type for _, each, model_type in sweep.cases()}
    defaults = CONFIG_MAPPING[types[name]]().to_dict()
    small = sweep.shrink(defaults)
    text: Any = small.get("text_config", small)
    assert text["vocab_size"] == sweep.VOCAB
    assert text["hidden_size"] == 64
    assert text["num_hidden_layers"] == kinds
    for each in ("layer_types", "mlp_layer_types"):
        if each in text:
            assert set(text[each]) == set(defaults.get("text_config", defaults)[each])
    one, other = (next(iter(sweep.tiny_models(name, types[name]))) for _ in range(2))
    assert isinstance(one, getattr(transformers, name))
    assert sum(each.numel() for each in one.parameters()) < 1_000_000
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert any(not sweep.failure(one, inputs) for inputs in sweep.inputs_of(one))


def test_a_class_that_the_sweep_cannot_build() -> None:
    record = sweep.try_class("PerceiverForMaskedLM", "perceiver")
    assert record["outcome"] == "cannot be built tiny"
    assert record["sentence"].endswith("million parameters after shrinking")


def test_the_page_is_current() -> None:
    assert sweep.TARGET.read_text(encoding="utf-8") == sweep.page(), "run python tools/sweep.py --limit 0"
