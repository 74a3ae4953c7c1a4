"""Models of every class, from a directory to 8 bits and back: in Python, on the command line, in pipelines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import smoothquant
from tiny_media import processor_of, write_data, write_images, write_other, write_sounds
from tiny_others import OTHERS, build_other, outputs
from torch import nn

import smoothquant_ext
from smoothquant_ext import Recipe, load, quantize, save
from smoothquant_ext.checkpoint.model_classes import task_of
from smoothquant_ext.evaluation.agreement import agree_all
from smoothquant_ext.models import load_model
from smoothquant_ext.nn.linear import W8A8Linear

SMALL = ("--samples", "4", "--seqlen", "24")
# What computes the answer of each class, which stays in floating point.
ANSWERS = {
    "BertForMaskedLM": "cls.predictions.decoder",
    "BertForSequenceClassification": "classifier",
    "RobertaForTokenClassification": "classifier",
    "LlamaForSequenceClassification": "score",
    "DistilBertForSequenceClassification": "classifier",
    "ViTForImageClassification": "classifier",
    "Wav2Vec2ForCTC": "lm_head",
    "WhisperForConditionalGeneration": "proj_out",
    "T5ForConditionalGeneration": "lm_head",
}
TASK_OF = {
    **dict.fromkeys(("BertModel", "LlamaModel", "MPNetModel", "ModernBertModel"), "feature-extraction"),
    **dict.fromkeys(("CLIPModel", "SiglipModel"), "zero-shot-image-classification"),
    **dict.fromkeys(("BertForSequenceClassification", "LlamaForSequenceClassification"), "text-classification"),
    **dict.fromkeys(("BartForSequenceClassification",), "text-classification"),
    **dict.fromkeys(
        ("DistilBertForSequenceClassification", "DebertaV2ForSequenceClassification"), "text-classification"
    ),
    **dict.fromkeys(("BertLMHeadModel", "BartForCausalLM"), "text-generation"),
    **dict.fromkeys(("T5ForConditionalGeneration", "BartForConditionalGeneration"), "text2text-generation"),
    **dict.fromkeys(("MarianMTModel",), "text2text-generation"),
    **dict.fromkeys(("WhisperForConditionalGeneration", "Wav2Vec2ForCTC"), "automatic-speech-recognition"),
    **dict.fromkeys(("LlavaForConditionalGeneration",), "image-text-to-text"),
    **dict.fromkeys(("Qwen2_5_VLForConditionalGeneration",), "image-text-to-text"),
    "BertForMaskedLM": "fill-mask",
    "RobertaForTokenClassification": "token-classification",
    "ViTForImageClassification": "image-classification",
    "T5EncoderModel": None,
}
# Of classes with a norm before each layer: what the norms' outputs are read by.
NORMS = {
    "ViTForImageClassification": {
        "layernorm_before": ("q_proj", "k_proj", "v_proj"),
        "layernorm_after": ("fc1",),
    },
    "WhisperForConditionalGeneration": {
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "final_layer_norm": ("fc1",),
    },
    "CLIPModel": {"layer_norm1": ("q_proj", "k_proj", "v_proj"), "layer_norm2": ("fc1",)},
}


def inputs(name: str) -> dict[str, Any]:
    """The data of a class without options."""
    return {key: value for key, value in OTHERS[name][2].items() if key != "use_cache"}


@pytest.mark.parametrize("name", OTHERS)
def test_in_python(name: str, tmp_path: Path) -> None:
    model = build_other(name)
    reference = copy.deepcopy(model)
    quantize(model, [inputs(name)] * 4, Recipe(rotate="inputs,auto"), progress=False)
    assert agree_all({"w8a8": model}, [inputs(name)], reference)["w8a8"].error < 0.05
    report = model.smoothquant_report
    assert report.quantized
    if name in ANSWERS:
        assert report.skipped[ANSWERS[name]] in ("output embedding", "computes what the model returns")
        assert isinstance(model.get_submodule(ANSWERS[name]), nn.Linear)
    save(model, tmp_path / "w8a8")
    loaded = load(tmp_path / "w8a8")
    assert type(loaded) is type(model)
    for one, other in zip(outputs(loaded, name), outputs(model, name), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", OTHERS)
def test_on_the_command_line(name: str, tmp_path: Path) -> None:
    base, data = write_other(name, tmp_path / "model"), write_data(name, tmp_path / "data")
    target = tmp_path / "w8a8"
    smoothquant("quantize", base, "-o", target, "--calib", data, *SMALL)
    result = smoothquant("compare", base, target, "--text", data, *SMALL, "--rounds", "0", "--json")
    _, measured = json.loads(result.stdout)
    if "perplexity" in measured:
        assert abs(measured["change"]) < 0.05
    else:
        assert measured["rows"] == 4
        assert measured["error"] < 0.05
    loaded, processor = load_model(target)
    assert type(loaded).__name__ == name
    assert type(processor) is type(processor_of(name))
    assert any(isinstance(module, W8A8Linear) for module in loaded.modules())
    task = TASK_OF[name]
    card = (target / "README.md").read_text()
    assert f"from transformers import {task_of(name)[1]}\n" in card
    assert (f"pipeline_tag: {task}\n" in card) if task else "pipeline_tag" not in card


@pytest.mark.parametrize("name", NORMS)
def test_smoothing_and_rotation_pay(name: str) -> None:
    model = build_other(name)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(3)  # away from a softmax that treats all alike
    reference = copy.deepcopy(model)
    _amplify_(model, NORMS[name])
    preserved = agree_all({"amplified": model}, [inputs(name)], reference)["amplified"]
    assert preserved.error < 1e-4
    errors = []
    for recipe in (Recipe(smooth=False), Recipe(rotate="inputs,auto")):
        other = quantize(copy.deepcopy(model), [inputs(name)] * 4, recipe, progress=False)
        errors.append(agree_all({"w8a8": other}, [inputs(name)], reference)["w8a8"].error)
    assert errors[1] < errors[0] / 3, errors


def _amplify_(model: nn.Module, groups: dict[str, tuple[str, ...]]) -> None:
    """A few channels of each norm 30 times larger, and undone in its readers."""
    modules = dict(model.named_modules())
    for name, norm in modules.items():
        block, _, last = name.rpartition(".")
        if last not in groups:
            continue
        readers = [
            module for path, module in modules.items() if path.startswith(f"{block}.") and path.endswith(groups[last])
        ]
        assert readers
        norm.weight.data[:3] *= 30
        norm.bias.data[:3] *= 30
        for reader in readers:
            reader.weight.data[:, :3] /= 30


@pytest.mark.parametrize(
    ("name", "task", "given"),
    [
        ("BertForMaskedLM", "fill-mask", "w5 w6 <mask> w8"),
        ("BertForSequenceClassification", "text-classification", "w5 w6 w7"),
        ("RobertaForTokenClassification", "token-classification", "w5 w6 w7"),
        ("BertModel", "feature-extraction", "w5 w6 w7"),
        ("ViTForImageClassification", "image-classification", "image"),
        ("Wav2Vec2ForCTC", "automatic-speech-recognition", "sound"),
    ],
)
def test_pipelines(name: str, task: str, given: str, tmp_path: Path) -> None:
    """transformers' pipelines run a directory that we saved."""
    processor = processor_of(name)
    if task == "fill-mask":
        processor.add_special_tokens({"mask_token": "<mask>"})
    model = build_other(name)
    if task == "fill-mask":
        model.resize_token_embeddings(len(processor))
    reference = copy.deepcopy(model)
    quantize(model, [inputs(name)] * 4, progress=False)
    save(model, tmp_path / "w8a8", processor)
    if given == "image":
        given = str(next(write_images(tmp_path / "data", 1).glob("*.png")))
    what: Any = given
    if given == "sound":
        from smoothquant_ext.media import read_sound

        what = read_sound(next(write_sounds(tmp_path / "data", 1).glob("*.wav")), 16_000)
    smoothquant_ext.enable()
    try:
        pipe = transformers.pipeline(task, model=str(tmp_path / "w8a8"), device="cpu")
        answer = pipe(what)
    finally:
        smoothquant_ext.disable()
    assert type(pipe.model) is type(reference)
    assert any(isinstance(module, W8A8Linear) for module in pipe.model.modules())
    assert answer
