"""Prompts for transformers' continuous batching. Those that would end its worker, and with it every other prompt, or
would get the answer to another one, are refused first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, PreTrainedModel

from ..errors import SmoothQuantError
from .embedding import vocabulary_size


def generate_batch(
    model: PreTrainedModel,
    inputs: Sequence[Sequence[int]],
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    **options: Any,
) -> Any:
    """transformers' own, with prompts that it can answer.

    Raises:
        SmoothQuantError: a prompt is empty, holds what is no token of the model, or is too long for the cache.
    """
    config = generation_config or model.generation_config
    answer = options.get("max_new_tokens") or config.max_new_tokens or 1
    for index, prompt in enumerate(inputs):
        check_prompt(prompt, answer, vocabulary_size(model), _tokens(continuous_batching_config), f"prompt {index}")
    return type(model).generate_batch(model, inputs, generation_config, continuous_batching_config, **options)


def checked_(manager: Any, model: PreTrainedModel) -> Any:
    """A manager of continuous batching whose ``add_request`` refuses such prompts too; ``manager`` itself."""
    manager.add_request = partial(_add_request, manager.add_request, manager, vocabulary_size(model))
    return manager


def _add_request(
    add: Callable[..., Any],
    manager: Any,
    vocabulary: int,
    input_ids: Sequence[int],
    *args: Any,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Any:
    answer = max_new_tokens or manager.generation_config.max_new_tokens or 1
    check_prompt(input_ids, answer, vocabulary, _tokens(manager.continuous_batching_config), "the prompt")
    return add(input_ids, *args, max_new_tokens=max_new_tokens, **options)


def check_prompt(prompt: Sequence[int], answer: int, vocabulary: int, cache: int | None, name: str) -> None:
    """Raises if continuous batching cannot answer a prompt.

    Args:
        prompt: token ids.
        answer: the most tokens of its answer.
        vocabulary: the number of tokens that the model knows.
        cache: tokens in the cache, ``None`` if that is not known yet.
        name: what the error calls the prompt.
    """
    if len(prompt) == 0:
        raise SmoothQuantError(f"{name} is empty: give it at least one token")
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocabulary:
        raise SmoothQuantError(
            f"{name} holds token id {high if low >= 0 else low}, but the model knows 0 to {vocabulary - 1}"
        )
    if cache is not None and len(prompt) + answer > cache:
        raise SmoothQuantError(
            f"{name} has {len(prompt)} tokens and its answer up to {answer}, but the cache holds {cache}: give "
            f"ContinuousBatchingConfig more num_blocks"
        )


def _tokens(config: ContinuousBatchingConfig | None) -> int | None:
    if config is None or config.num_blocks is None:
        return None
    size = getattr(config, "page_size", None) or config.block_size  # its name from transformers 5.17 on, and before
    return config.num_blocks * size if size else None
