"""LoRA adapters of PEFT on 8-bit layers: put on, trained, saved, loaded, switched off; never merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_w8a8 import logits, quantized
from torch import Tensor, nn

import smoothquant_ext
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.embedding import vocabulary_size
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.scheme import SCHEMES

peft = pytest.importorskip("peft")
IDS = tiny.token_ids()


@pytest.fixture(autouse=True)
def _enabled() -> Any:
    smoothquant_ext.enable()
    yield
    smoothquant_ext.disable()


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
def test_an_adapter_learns_and_comes_back(scheme: str, tmp_path: Path) -> None:
    base = quantized("llama", scheme)
    base.requires_grad_(False)
    before = logits(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(base, config)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)  # it begins as nothing

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    # Those of the first layer too, whose gradient went through 8-bit layers.
    assert all(bool(parameter.abs().sum() > 0) for name, parameter in model.named_parameters() if "lora_B" in name)

    model.eval()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized("llama", scheme), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    ids = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), ids)
    with pytest.raises(SmoothQuantError, match="cannot be merged into 8-bit weights"):
        model.merge_and_unload()


def test_a_model_whose_token_embedding_reads_its_head(tmp_path: Path) -> None:
    def base() -> Any:
        model = tiny.build("llama", tie_word_embeddings=True)
        return smoothquant_ext.quantize(model, IDS, smoothquant_ext.Recipe(head="8bit"), progress=False)

    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        model = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        assert not torch.equal(logits(model), logits(base()))
        model(IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model.eval()))


def test_an_adapter_on_the_token_embedding_leaves_the_vocabulary_known() -> None:
    model = peft.get_peft_model(quantized("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert vocabulary_size(model) == tiny.VOCAB


def test_float_layers_are_adapted_as_ever() -> None:
    model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear"


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static", "fp8-e5m2"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_that_of_the_dequantized_weight(scheme: str, packed: bool) -> None:
    linear = nn.Linear(24, 10)
    smooth = torch.rand(24) + 0.5
    layer = quantize_linear(linear, torch.full((24,), 3.0), SCHEMES[scheme], smooth=smooth)
    if not packed:
        layer._unpack_()
    x = torch.randn(3, 24, requires_grad=True)
    y: Tensor = layer(x)
    assert torch.equal(y, layer(x.detach()))
    weight = layer.plain_weight().float() * layer._plain_scale() / smooth
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    torch.testing.assert_close(gradient, y.detach() @ weight, rtol=1e-5, atol=1e-5)


def test_norms_below_adapters_can_be_trained() -> None:
    base = quantized("llama")
    base.requires_grad_(False)
    config = peft.LoraConfig(
        r=2, target_modules=["down_proj"], modules_to_save=["input_layernorm", "post_attention_layernorm"]
    )
    model = peft.get_peft_model(base, config)
    model(IDS, labels=IDS).loss.backward()
    norms = {name: p.grad for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(norms) == 4
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in norms.values()), norms


def test_prefixes_are_trained_in_every_layer() -> None:
    base = quantized("llama")
    base.requires_grad_(False)
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model(input_ids=IDS, labels=IDS).loss.backward()
    (gradient,) = [p.grad for p in model.parameters() if p.requires_grad]
    per_layer = gradient.reshape(3, 2, -1).abs().sum((0, 2))  # keys and values of a layer lie together
    assert bool((per_layer > 0).all()), per_layer


def test_training_leaves_nothing_waiting() -> None:
    base = quantized("llama")
    base.requires_grad_(False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model(IDS, labels=IDS).loss.backward()
    shared = {id(m.shared): m.shared for m in base.modules() if getattr(m, "shared", None) is not None}
    later = [group for group in shared.values() if group._waiting is not None]
    assert len(later) <= 1  # the first layer's input has no gradient


def test_what_cannot_be_adapted_is_said(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match="8-bit layers have none: use LoRA"):
        peft.get_peft_model(quantized("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model = peft.get_peft_model(quantized("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (model, model.base_model.model):
        with pytest.raises(SmoothQuantError, match="has adapters; save adapters with their own save_pretrained"):
            smoothquant_ext.save(each, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_disable_takes_it_back() -> None:
    smoothquant_ext.disable()
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(quantized("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
