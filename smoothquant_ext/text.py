"""Reads text from files, folders or ``datasets``, and draws windows of tokens from it for calibration and tests."""

from __future__ import annotations

import itertools
import json
import os
import random
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import SmoothQuantError

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
OTHER_FORMATS = {".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".xz", ".bz2", ".pdf", ".docx"}

CHARACTERS_PER_TOKEN = 16
"""An upper bound of the characters per token, averaged over a window."""

Source = str | os.PathLike[str]


def read_text(source: Source, max_characters: int | None = None) -> list[str]:
    """Reads the documents of a text source.

    Args:
        source: a UTF-8 text file; a jsonl file (the string field ``text`` of each line, or its only string field); a
            folder of such files, searched recursively and read in the order of their names; or a dataset as
            ``NAME[/CONFIG][:SPLIT]`` (default split: ``train``), which needs the package ``datasets``.
        max_characters: stops reading a dataset after this number of characters; files are read whole.

    Returns:
        The documents with more than white space; at least one.

    Raises:
        SmoothQuantError: when the source does not exist, cannot be decoded, or holds no text.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES + JSONL_SUFFIXES)
        if not files:
            raise SmoothQuantError(f"the folder {path} holds no .txt, .md or .jsonl file: give a folder of text files")
        documents = [document for file in files for document in _read_file(file)]
    elif path.exists():
        documents = _read_file(path)
    elif _looks_like_a_path(str(source)):
        raise SmoothQuantError(f"{path} does not exist: give a text file, a jsonl file, a folder of them or a dataset")
    else:
        documents = _read_dataset(str(source), max_characters)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SmoothQuantError(f"{source} is empty: give a source that holds text")
    return documents


def token_windows(tokenizer: Any, source: Source | Sequence[str], samples: int, seqlen: int, seed: int = 0) -> Tensor:
    """Draws contiguous windows of tokens, one from each of ``samples`` equal stretches of the text.

    The same arguments give the same windows. If the tokenizer puts special tokens before a text (Llama's and Gemma's
    BOS), every window starts with them, because these models misbehave without. A text with fewer whole windows than
    ``samples`` gives those, with a warning.

    Args:
        tokenizer: a transformers tokenizer.
        source: a source for ``read_text``, or a list of documents.
        samples: number of windows.
        seqlen: tokens in each window, BOS included.
        seed: seed of each window's position in its stretch.

    Returns:
        int64 [samples, seqlen].

    Raises:
        SmoothQuantError: for bad text (see ``read_text``), for text shorter than one window, and for ``samples`` or
            ``seqlen`` too small.
    """
    if samples < 1:
        raise SmoothQuantError(f"samples is {samples}, expected at least 1")
    prefix = _prefix(tokenizer)
    if seqlen < 2 + len(prefix):
        raise SmoothQuantError(f"seqlen is {seqlen}, expected at least {2 + len(prefix)}")
    wanted = samples * seqlen * CHARACTERS_PER_TOKEN
    if isinstance(source, (str, os.PathLike)):
        name, documents = str(source), read_text(source, max_characters=2 * wanted)
    else:
        name, documents = "the text", list(source)
    text = "\n\n".join(document.strip("\n") for document in documents)
    length = seqlen - len(prefix)
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
    windows = [prefix + stretch[start : start + length] for stretch, start in zip(stretches, starts, strict=True)]
    return torch.tensor(windows, dtype=torch.int64)


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


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain, special = _tokenize(tokenizer, "a"), tokenizer("a").input_ids
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return list(special[:start])
    return []


def _read_file(path: Path) -> list[str]:
    if path.suffix.lower() in OTHER_FORMATS:
        raise SmoothQuantError(f"{path} is neither text nor jsonl: convert it to a .txt or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SmoothQuantError(f"{path} is not UTF-8 text (byte {error.start}): give a text or jsonl file") from error
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() in JSONL_SUFFIXES:
        return [_text_field(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [text]


def _text_field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SmoothQuantError(f"{where}, is not JSON ({error}): give one JSON object a line") from error
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise SmoothQuantError(
            f"{where}, is not a JSON object: give one object a line, with the text in its field 'text'"
        )
    return _text_of(row, where)


def _text_of(row: dict[str, Any], where: str) -> str:
    text = row.get("text")
    if isinstance(text, str):
        return text
    strings = [value for value in row.values() if isinstance(value, str)]
    if len(strings) != 1:
        fields = ", ".join(repr(field) for field in row) or "none"
        raise SmoothQuantError(
            f"{where}, has no string field 'text' (its fields: {fields}): rename the field of the text to 'text'"
        )
    return strings[0]


def _looks_like_a_path(source: str) -> bool:
    known = TEXT_SUFFIXES + JSONL_SUFFIXES + tuple(OTHER_FORMATS)
    return source.startswith((".", "/", "~")) or "\\" in source or source.lower().endswith(known) or not source


def _read_dataset(source: str, max_characters: int | None) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise SmoothQuantError(
            f"{source} is not a file here, and reading it as a dataset needs the package datasets: "
            "run pip install datasets, or give a text file"
        ) from error
    name, _, split = source.partition(":")
    documents: list[str] = []
    characters = 0
    try:
        for row in _dataset_rows(datasets, name, split or "train"):
            documents.append(_text_of(row, f"a row of dataset {name}"))
            characters += len(documents[-1])
            if max_characters is not None and characters > max_characters:
                break
    except SmoothQuantError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # OSError covers ConnectionError and DatasetNotFoundError: no network, or no such name.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SmoothQuantError(
            f"{source} is not a file here and cannot be read as a dataset ({reason}): "
            "give a file or folder that exists, or check the name, the configuration, the split and the network"
        ) from error
    return documents


def _dataset_rows(datasets: Any, name: str, split: str) -> Iterable[dict[str, Any]]:
    # Some corpora take hundreds of gigabytes; streaming reads only what is used. Offline, only the cache is readable.
    streaming = not datasets.config.HF_HUB_OFFLINE

    def load(*names: str) -> Iterable[dict[str, Any]]:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(*names, split=split, streaming=streaming)
        return rows

    parts = name.split("/")
    if len(parts) == 2:
        try:
            return load(name)  # "owner/name"
        except (datasets.exceptions.DatasetNotFoundError, ValueError):
            return load(*parts)  # "name/configuration"
    if len(parts) == 3:
        return load("/".join(parts[:2]), parts[2])
    return load(name)
