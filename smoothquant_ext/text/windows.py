"""Draws windows of tokens from text."""

from __future__ import annotations

import itertools
import os
import random
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from ..probing.lookups import find_limits
from ..traits import predicts_next_token
from .documents import Source, read_documents, to_documents
from .rows import joined

CHARACTERS_PER_TOKEN = 16
"""An upper bound of the characters per token, averaged over a window."""


def token_windows(
    tokenizer: Any,
    source: Source | Iterable[Any],
    samples: int,
    seqlen: int,
    seed: int = 0,
    model: nn.Module | None = None,
    field: str | None = None,
) -> Tensor:
    """Draws contiguous windows of tokens, one from each of ``samples`` equal stretches of the text.

    The same arguments give the same windows. If the tokenizer puts special tokens before a text (Llama's and Gemma's
    BOS), every window starts with them, once, because these models misbehave without; for a ``model`` that does not
    continue texts, such as an encoder, it also ends with those that come after a text. A text with fewer whole windows
    than ``samples`` gives those, and a model with fewer positions than ``seqlen`` shorter windows, with a warning each.
    Documents and conversations follow one another.

    Args:
        tokenizer: a transformers tokenizer.
        source: a source for ``read_text``, or documents: texts, rows with their fields, or lists of messages.
        samples: number of windows.
        seqlen: tokens in each window, BOS included.
        seed: seed of each window's position in its stretch.
        model: the model that is to read the windows.
        field: the field of rows to read, if it cannot be told.

    Returns:
        int64 [samples, seqlen].

    Raises:
        SmoothQuantError: for bad text (see ``read_text``), for text shorter than one window, and for ``samples`` or
            ``seqlen`` too small.
    """
    if samples < 1:
        raise SmoothQuantError(f"samples is {samples}, expected at least 1")
    prefix, suffix = _frame(tokenizer)
    if model is None or predicts_next_token(model):
        suffix = []
    seqlen = _fitting(seqlen, tokenizer, model)
    if seqlen < 2 + len(prefix) + len(suffix):
        raise SmoothQuantError(f"seqlen is {seqlen}, expected at least {2 + len(prefix) + len(suffix)}")
    wanted = samples * seqlen * CHARACTERS_PER_TOKEN
    if isinstance(source, (str, os.PathLike)):
        name, documents = str(source), read_documents(source, 2 * wanted, tokenizer, field)
    else:
        name, documents = "the text", to_documents(source, tokenizer, field)
    text = joined(documents)
    length = seqlen - len(prefix) - len(suffix)
    stretches = _stretches(tokenizer, text, samples, length)
    if not stretches:
        tokens = len(_tokenize(tokenizer, text))
        raise SmoothQuantError(
            f"{name} has {tokens} tokens, fewer than one window of {length}: give more text or a smaller seqlen"
        )
    if len(stretches) < samples:
        warnings.warn(
            f"{name} holds {len(stretches)} windows of {seqlen} tokens, not {samples}: using those",
            stacklevel=2,
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, len(stretch) - length) for stretch in stretches]
    windows = [_window(stretch, start, length, prefix) for stretch, start in zip(stretches, starts, strict=True)]
    return torch.tensor([window + suffix for window in windows], dtype=torch.int64)


def _fitting(seqlen: int, tokenizer: Any, model: nn.Module | None) -> int:
    """``seqlen``, or what the model has positions for."""
    positions = None if model is None else find_limits(model).positions
    if positions is not None and seqlen > positions:
        warnings.warn(
            f"the model has {positions} positions: windows have {positions} tokens, not {seqlen}", stacklevel=3
        )
        return positions
    named = getattr(tokenizer, "model_max_length", None)
    if model is None and named is not None and seqlen > named:
        warnings.warn(f"windows have {seqlen} tokens, and the tokenizer speaks of {named} at most", stacklevel=3)
    return seqlen


def _window(stretch: list[int], start: int, length: int, prefix: list[int]) -> list[int]:
    """A window near ``start``, after the prefix; not where the text has the prefix itself, as chat templates do."""
    for near in (start, start + len(prefix), start - 1):
        is_inside = 0 <= near <= len(stretch) - length
        if is_inside and (not prefix or stretch[near : near + len(prefix)] != prefix):
            return prefix + stretch[near : near + length]
    return prefix + stretch[start : start + length]


def _stretches(tokenizer: Any, text: str, samples: int, length: int) -> list[list[int]]:
    """At most ``samples`` stretches of the tokenized text, evenly spread, each of at least ``length`` tokens."""
    size = length * CHARACTERS_PER_TOKEN
    if len(text) > samples * size:
        # Tokenizing all of a large corpus for a few windows would take minutes.
        starts = [_next_word(text, i * (len(text) - size) // max(samples - 1, 1)) for i in range(samples)]
        stretches = [_tokenize(tokenizer, text[start : start + size]) for start in starts]
        if all(len(stretch) >= length for stretch in stretches):
            return stretches
    tokens = _tokenize(tokenizer, text)
    count = min(samples, len(tokens) // length)
    edges = [i * len(tokens) // count for i in range(count + 1)] if count else []
    return [tokens[begin:end] for begin, end in itertools.pairwise(edges)]


def _next_word(text: str, start: int) -> int:
    """Moves ``start`` to the next white space, so that no word is cut, unless none is near (Chinese)."""
    if start == 0:
        return 0
    return next((i for i in range(start, min(start + 64, len(text))) if text[i].isspace()), start)


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain, special = _tokenize(tokenizer, "a"), tokenizer("a").input_ids
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start]), list(special[start + len(plain) :])
    return [], []
