"""Attention inside transformers: the same predictions as with "sdpa", wherever it is switched on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PreTrainedModel

from smoothquant_ext.nn.attention import IMPLEMENTATION, use_attention_

TOKENS = tiny.token_ids(3, 40)


def calls(model: PreTrainedModel, **arguments: Any) -> tuple[Tensor, int]:
    """The logits, and how often our kernel ran."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        logits = model(**arguments).logits
    return logits, sum(event.name == "sq::attention" for event in recorded.events())


def padded() -> dict[str, Tensor]:
    attention_mask = torch.ones_like(TOKENS)
    attention_mask[0, :15] = 0
    return {"input_ids": TOKENS, "attention_mask": attention_mask}


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_predictions_stay(model_type: str) -> None:
    model = tiny.build(model_type)
    plain = {name: calls(model, **inputs)[0] for name, inputs in (("all", {"input_ids": TOKENS}), ("padded", padded()))}
    before = model.config._attn_implementation
    uses_ours = use_attention_(model)
    # Models that attend in ways of their own stay as they are: with a bias (BLOOM), or capped scores (Gemma 2).
    assert uses_ours == (before == "sdpa" and model._can_set_attn_implementation())
    for name, inputs in (("all", {"input_ids": TOKENS}), ("padded", padded())):
        logits, count = calls(model, **inputs)
        assert count == (2 if uses_ours else 0)
        shown = inputs.get("attention_mask", torch.ones_like(TOKENS)).bool()
        # Two orders of fp32 sums, amplified by two layers of random weights.
        torch.testing.assert_close(logits[shown], plain[name][shown], rtol=1e-3, atol=1e-3)


def test_most_architectures_use_it() -> None:
    users = {model_type for model_type in tiny.CONFIGS if use_attention_(tiny.build(model_type))}
    assert users >= {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "phi3",
        "olmo2",
        "opt",
        "gpt2",
        "gpt_neox",
        "mixtral",
    }


def test_a_sliding_window_is_respected() -> None:
    model = tiny.build("mistral", sliding_window=8)
    expected, _ = calls(model, input_ids=TOKENS)
    assert use_attention_(model)
    logits, count = calls(model, input_ids=TOKENS)
    assert count == 2
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
def test_generation_stays(arguments: dict[str, Any]) -> None:
    model = tiny.build("llama")
    arguments = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True} | arguments
    expected = model.generate(**padded(), **arguments)
    assert use_attention_(model)
    assert torch.equal(model.generate(**padded(), **arguments), expected)


def test_training_goes_through_sdpa() -> None:
    model = tiny.build("llama")
    assert use_attention_(model)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_what_the_user_chose_stays() -> None:
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    assert not use_attention_(model)
    assert model.config._attn_implementation == "eager"
    assert not use_attention_(torch.nn.Linear(2, 2))


def test_saved_configurations_do_not_name_it(tmp_path: Any) -> None:
    model = tiny.build("llama")
    assert use_attention_(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != IMPLEMENTATION


def test_compiles_to_one_graph() -> None:
    model = tiny.build("llama")
    assert use_attention_(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=TOKENS, use_cache=False).logits, expected)
