"""The output embedding: which one can have 8 bits, and what the token embedding does with the same weight."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_others import OTHERS, build_other
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from smoothquant_ext.probing.head import Head, NoHead, find_head
from smoothquant_ext.probing.structure import find_structure


def found(model: nn.Module, batch: object = None) -> Head:
    return find_head(find_structure(model, tiny.token_ids() if batch is None else batch))


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_architecture(architecture: str, tied: bool) -> None:
    model = tiny.build(architecture, tie_word_embeddings=tied)
    if architecture == "llama4_text" and tied:
        with pytest.raises(NoHead, match=r"^model\.embed_tokens: its weight is read by something other"):
            found(model)
        return
    head, modules = found(model), dict(model.named_modules())
    assert modules[head.name] is model.get_output_embeddings()
    assert (modules[head.embedding] is model.get_input_embeddings()) if tied else head.embedding == ""
    assert head.factor == (math.sqrt(64) if tied and architecture.startswith("gemma") else 1.0)


def test_a_factor_of_16_bits() -> None:
    model = tiny.build("gemma3_text", torch.bfloat16, hidden_size=48, tie_word_embeddings=True)
    assert found(model).factor == float(model.model.embed_tokens.embed_scale) == pytest.approx(math.sqrt(48), rel=2**-8)


def change_embedding(model: PreTrainedModel, kind: type[nn.Embedding]) -> PreTrainedModel:
    model.get_input_embeddings().__class__ = kind
    return model


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + 1


class ByChannel(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * torch.arange(1, self.embedding_dim + 1).to(self.weight)


class Zero(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 0


class InFp32(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input).float()


@pytest.mark.parametrize("kind", [Shifted, ByChannel, Zero])
def test_embeddings_that_do_more_than_look_up(kind: type[nn.Embedding]) -> None:
    model = change_embedding(tiny.build("llama", tie_word_embeddings=True), kind)
    with pytest.raises(NoHead, match="does more than to look it up"):
        found(model)
    assert found(change_embedding(tiny.build("llama"), kind)).embedding == "", "untied, it is left alone"


def test_an_embedding_in_another_dtype() -> None:
    model = change_embedding(tiny.build("llama", torch.bfloat16, tie_word_embeddings=True), InFp32)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.to(torch.bfloat16))
    with pytest.raises(NoHead):
        found(model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("T5ForConditionalGeneration", "it shares its weight with"),  # encoder, decoder, head
        ("BertModel", "no output embedding that is a linear layer"),
        ("ViTForImageClassification", "no output embedding that is a linear layer"),
    ],
)
def test_models_without_a_head_for_it(name: str, reason: str) -> None:
    batch = {key: value for key, value in OTHERS[name][2].items() if isinstance(value, Tensor)}
    with pytest.raises(NoHead, match=reason):
        found(build_other(name), batch)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_that_asks_the_head_for_its_dtype(tied: bool) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 8}
    config = CONFIG_MAPPING["mamba"](**tiny.SIZES, **sizes, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(NoHead, match="its weight is read by something other than its own forward pass"):
        found(model)


class WithAScale(nn.Embedding):
    scale = 2.0


def test_a_model_that_reads_an_attribute_of_the_embedding() -> None:
    model = change_embedding(tiny.build("llama", tie_word_embeddings=True), WithAScale)
    forward = model.model.forward

    def scaled(input_ids: Tensor, inputs_embeds: None = None, **kwargs: object) -> object:
        embeddings = model.model.embed_tokens(input_ids) * model.model.embed_tokens.scale
        return forward(inputs_embeds=embeddings, **kwargs)

    model.model.forward = scaled
    with pytest.raises(NoHead, match="its attribute scale is read elsewhere"):
        found(model)


def test_a_weight_that_a_third_module_has_too() -> None:
    model = tiny.build("llama", tie_word_embeddings=True)
    model.model.layers[0].mlp.other = nn.Embedding(1, 1)
    model.model.layers[0].mlp.other.weight = model.lm_head.weight
    with pytest.raises(NoHead, match=r"shares its weight with model\.embed_tokens, model\.layers\.0\.mlp\.other"):
        found(model)
