"""Continuous batching from Python, with prompts that transformers' worker would die of."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from smoothquant_ext import Recipe, quantize
from smoothquant_ext.errors import SmoothQuantError

CACHE = 256
BAD: dict[str, tuple[list[int], str]] = {
    "empty": ([], "is empty: give it at least one token"),
    "beyond the vocabulary": ([5, tiny.VOCAB], f"holds token id {tiny.VOCAB}, but the model knows 0 to 95"),
    "negative": ([-1, 5], "holds token id -1, but the model knows 0 to 95"),
    "as long as the cache": ([5] * CACHE, f"has {CACHE} tokens and its answer up to 4, but the cache holds {CACHE}"),
    "with its answer longer than the cache": ([5] * (CACHE - 3), "and its answer up to 4, but the cache holds 256"),
}


def settings() -> dict[str, Any]:
    return {
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=CACHE // 32, block_size=32),
    }


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    network = tiny.build("llama", max_position_embeddings=2 * CACHE)
    quantized: PreTrainedModel = quantize(network, [tiny.token_ids()], Recipe("int8"), progress=False)
    return quantized


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [output.generated_tokens for output in model.generate_batch(prompts, **settings()).values()]


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_prompt_is_named_and_the_others_are_answered_without_it(model: Any, kind: str) -> None:
    good = [[5, 6, 7], [8, 9]]
    before = answers(model, good)
    bad, words = BAD[kind]
    with pytest.raises(SmoothQuantError, match=r"^prompt 1 ") as raised:
        model.generate_batch([good[0], bad, good[1]], **settings())
    assert words in str(raised.value)
    assert answers(model, good) == before
    assert [len(answer) for answer in before] == [4, 4]


@pytest.mark.parametrize("kind", list(BAD))
def test_a_manager_refuses_it_and_lives(model: Any, kind: str) -> None:
    bad, words = BAD[kind]
    with model.continuous_batching_context_manager(**settings(), warmup=False) as manager:
        with pytest.raises(SmoothQuantError, match=r"^the prompt ") as raised:
            manager.add_request(bad, max_new_tokens=4)
        assert words in str(raised.value)
        manager.add_request([5, 6, 7], max_new_tokens=4)
        result = manager.get_result(timeout=60)
        assert manager.is_running()
    assert [result.generated_tokens] == answers(model, [[5, 6, 7]])


def test_a_prompt_may_fill_the_cache(model: Any) -> None:
    assert [len(answer) for answer in answers(model, [[5] * (CACHE - 4)])] == [4]


def test_no_prompts_have_no_answers(model: Any) -> None:
    assert model.generate_batch([], **settings()) == {}
