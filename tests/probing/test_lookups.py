"""What a model can look up, against where it fails when it is run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from smoothquant_ext.probing.lookups import Limits, find_limits

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def other(model_type: str, auto: Any = AutoModelForCausalLM, **settings: object) -> nn.Module:
    return auto.from_config(CONFIG_MAPPING[model_type](**settings)).eval()


BERT = SMALL | {"max_position_embeddings": 16, "pad_token_id": 1}
# Learned positions, tables with rows of no position, sinusoids in a buffer, biases of attention.
WITH_TABLES = {
    "gpt2": lambda: tiny.build("gpt2", max_position_embeddings=16),
    "opt": lambda: tiny.build("opt", max_position_embeddings=16),
    "opt, padded with a token of the probe": lambda: tiny.build("opt", max_position_embeddings=16, pad_token_id=5),
    "gptj": lambda: tiny.build("gptj", max_position_embeddings=16),
    "mpt": lambda: tiny.build("mpt", max_seq_len=16),
    "bert": lambda: other("bert", AutoModel, **BERT),
    "roberta": lambda: other("roberta", AutoModel, **BERT),
    "ctrl": lambda: other("ctrl", vocab_size=tiny.VOCAB, n_positions=16, n_embd=32, dff=48, n_layer=1, n_head=2),
    "half precision": lambda: tiny.build("gpt2", torch.bfloat16, max_position_embeddings=16),
    "our own": lambda: Learned(16),
}


class Learned(nn.Module):
    """A plain module without a configuration, that slices a parameter of its positions out of a table."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tiny.VOCAB, 8)
        self.places = nn.Parameter(torch.randn(positions, 8))
        self.layers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.tokens(input_ids) + self.places[torch.arange(input_ids.shape[1])]
        return self.layers[0](x)


def runs(model: nn.Module, ids: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_TABLES)
def test_the_limit_is_where_the_model_fails(name: str) -> None:
    model = WITH_TABLES[name]()
    limit = find_limits(model).positions
    assert limit is not None
    assert runs(model, tiny.token_ids(1, limit))
    assert not runs(model, tiny.token_ids(1, limit + 1))


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3_moe", "gemma3_text", "bloom", "falcon-sequential", "gpt_neox"]
)
def test_models_without_a_table_have_no_limit(architecture: str) -> None:
    settings = {} if architecture == "bloom" else {"max_position_embeddings": 16}
    model = tiny.build(architecture, **settings)
    limits = find_limits(model)
    assert limits.positions is None
    assert limits.vocabulary == tiny.VOCAB
    assert architecture == "bloom" or limits.trained == 16
    assert runs(model, tiny.token_ids(1, 40))


def test_the_smallest_of_several_tables_is_the_limit() -> None:
    model = Learned(16)
    model.tokens = nn.ModuleDict({"a": nn.Embedding(30, 8), "b": nn.Embedding(20, 8)})
    model.tokens.forward = lambda ids: model.tokens["a"](ids) + model.tokens["b"](ids)
    assert find_limits(model) == Limits(20, 16, None)


class Stubborn(nn.Module):
    """Runs on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        raise KeyError("images")


def test_a_model_that_does_not_run_on_tokens_alone_has_no_known_limit() -> None:
    assert find_limits(Stubborn()) == Limits()


def test_a_model_is_run_to_the_end_of_its_first_block_and_left_as_it_was() -> None:
    model = tiny.build("gpt2", max_position_embeddings=16)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_limits(model)
    assert "transformer.h.0" in ran
    assert "transformer.h.1" not in ran
    assert "" not in ran, "the model did not come to its end"
    assert all(len(module._forward_hooks) == 1 for module in model.modules())


def test_the_limits_of_several_models_are_those_of_all() -> None:
    both = Limits.least([Limits(5, None, 9), Limits(7, 3, None, 64), Limits()])
    assert both == Limits(5, 3, 9, 64)
