"""Checks of what a user asks a model to continue."""

from __future__ import annotations

import math
import warnings
from typing import Any

from ..errors import SmoothQuantError
from ..nn.embedding import vocabulary_size

COLDEST = 1e-6  # logits divided by less would overflow


def check_temperature(temperature: float) -> None:
    """Raises for a temperature that cannot be sampled with."""
    if not math.isfinite(temperature) or 0 < temperature < COLDEST:
        raise SmoothQuantError(f"--temperature is {temperature}, expected 0 or a number of at least {COLDEST:g}")


def check_text(option: str, text: str) -> None:
    """Raises if a shell gave bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SmoothQuantError(f"{option} is not UTF-8: the character at {error.start} is not") from None


def room_for(name: str, network: Any, input_ids: Any, answer: int) -> int:
    """The number of tokens that an answer may have; says so if it is less than the user asked for.

    Args:
        name: what the user calls the model.
        network: the model.
        input_ids: token ids of the prompt [1, tokens].
        answer: the number of tokens that the user asked for.

    Raises:
        SmoothQuantError: the prompt is empty, longer than the model, or has tokens that the model does not know.
    """
    tokens = input_ids.shape[1]
    if tokens == 0:
        raise SmoothQuantError("the prompt is empty: give a text to continue")
    known = vocabulary_size(network)
    highest = int(input_ids.max())
    if highest >= known:
        raise SmoothQuantError(
            f"the tokenizer of {name} does not fit the model: it gave token {highest}, but the model knows {known}"
        )
    positions: int | None = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return answer
    left: int = positions - tokens
    if left < 1:
        raise SmoothQuantError(f"the prompt has {tokens} tokens, but {name} has {positions} positions: shorten it")
    if left < answer:
        warnings.warn(
            f"{name} has {positions} positions and the prompt {tokens} tokens, so the answer ends after {left}, not "
            f"{answer}",
            stacklevel=2,
        )
    return min(left, answer)
