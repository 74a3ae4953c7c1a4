"""Reads the documents of a text source: a file, a folder or a dataset."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..compat import first_line
from ..errors import SmoothQuantError
from .files import COMPRESSED, JSONL_SUFFIXES, OTHER_FORMATS, TEXT_SUFFIXES, Row, in_folder, read_file, suffix_of
from .rows import Document, Rows, encodable

ROW_SUFFIXES = (".json", ".csv", ".tsv", ".parquet", ".arrow")
Source = str | os.PathLike[str]


def read_text(
    source: Source, max_characters: int | None = None, tokenizer: Any = None, field: str | None = None
) -> list[str]:
    """Reads the documents of a text source, and says on stderr which fields of its rows it reads.

    A row is a document: its string field ``text`` or, with a conversation in a field such as ``messages`` or
    ``conversations`` or with a question and its answer, the conversation in the form of the tokenizer's chat template;
    or its only string field that is not called as a name, an address or a language is.

    Args:
        source: a file of text (UTF-8, or UTF-16 with a mark); a file of rows: JSON lines, a JSON list, csv, tsv,
            parquet or arrow; either also as .gz, .bz2 or .xz; a folder of such files except JSON lists, csv and tsv,
            searched recursively and read in the order of their names; or a dataset as ``NAME[/CONFIG][:SPLIT]``
            (default split: ``train``), which needs the package ``datasets``.
        max_characters: stops reading a dataset after this number of characters; files are read whole.
        tokenizer: the one whose chat template conversations go through; without, their messages follow one another.
        field: the field of rows to read.

    Returns:
        The documents with more than white space; at least one.

    Raises:
        SmoothQuantError: when the source does not exist, cannot be decoded, holds no text, or has a row of which the
            text cannot be told, which is named.
    """
    return [document.text for document in read_documents(source, max_characters, tokenizer, field)]


def read_documents(
    source: Source, max_characters: int | None = None, tokenizer: Any = None, field: str | None = None
) -> list[Document]:
    """``read_text`` with what is a conversation."""
    path, rows = Path(source).expanduser(), Rows(str(source), tokenizer, field)
    if path.is_dir():
        documents = [document for file in _files_of(path) for document in _documents_of(file, rows)]
    elif path.exists():
        documents = _documents_of(path, rows)
    elif _looks_like_a_path(str(source)):
        raise SmoothQuantError(f"{path} does not exist: give a text file, a jsonl file, a folder of them or a dataset")
    else:
        documents = _read_dataset(str(source), max_characters, rows)
    rows.conclude()
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise SmoothQuantError(f"{source} is empty: give a source that holds text")
    return documents


def to_documents(source: Iterable[Any], tokenizer: Any, field: str | None = None) -> list[Document]:
    """The documents of texts, rows and conversations in memory.

    Raises:
        SmoothQuantError: one of them is none of these.
    """
    rows = Rows("the text", tokenizer, field)
    documents: list[Document] = []
    for number, each in enumerate(source, 1):
        if not isinstance(each, (str, dict, list, tuple)):
            kind = "None" if each is None else f"of type {type(each).__name__}"
            raise SmoothQuantError(f"document {number} is {kind}, expected a text, a row with its fields or messages")
        documents.append(rows.document(each, f"document {number}"))
    rows.conclude()
    return [document for document in documents if document.text.strip()]


def _files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    read = [file for file in files if in_folder(file)]
    left = [file for file in files if file not in read and suffix_of(file) in ROW_SUFFIXES]
    if not read:
        what = f"one of its files by name, such as {left[0]}" if left else "a folder of text files"
        raise SmoothQuantError(f"the folder {folder} holds no .txt, .md or .jsonl file: give {what}")
    if left:
        names = ", ".join(sorted({suffix_of(file) for file in left}))
        warnings.warn(
            f"files in the folder {folder} with the ending {names} are not read: give them by name", stacklevel=4
        )
    return read


def _documents_of(path: Path, rows: Rows) -> list[Document]:
    content = read_file(path)
    if not isinstance(content, str):
        return [rows.document(row, where) for where, row in content]
    if rows.field is not None:
        raise SmoothQuantError(f"{path} is text without fields: leave out --text-field {rows.field}")
    return [Document(encodable(content))]


def _looks_like_a_path(source: str) -> bool:
    known = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *ROW_SUFFIXES, *OTHER_FORMATS, *COMPRESSED)
    return source.startswith((".", "/", "~")) or "\\" in source or source.lower().endswith(known) or not source


def _read_dataset(source: str, max_characters: int | None, rows: Rows) -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise SmoothQuantError(
            f"{source} is not a file here, and reading it as a dataset needs the package datasets: "
            "run pip install datasets, or give a text file"
        ) from error
    name, _, split = source.partition(":")
    documents: list[Document] = []
    characters = 0
    try:
        for where, row in _dataset_rows(datasets, name, split or "train"):
            documents.append(rows.document(row, where))
            characters += len(documents[-1].text)
            if max_characters is not None and characters > max_characters:
                break
    except SmoothQuantError:
        raise
    except Exception as error:  # no network, no such name, a broken shard: each of its libraries has its own
        reason = first_line(error) if str(error).strip() else type(error).__name__
        raise SmoothQuantError(
            f"{source} is not a file here and cannot be read as a dataset ({reason}): "
            "give a file or folder that exists, or check the name, the configuration, the split and the network"
        ) from error
    return documents


def _dataset_rows(datasets: Any, name: str, split: str) -> Iterable[Row]:
    # Some corpora take hundreds of gigabytes; streaming reads only what is used. Offline, only the cache is readable.
    streaming = not datasets.config.HF_HUB_OFFLINE

    def load(*names: str) -> Iterable[Row]:
        rows = datasets.load_dataset(*names, split=split, streaming=streaming)
        return ((f"row {number} of dataset {name}", row) for number, row in enumerate(rows, 1))

    parts = name.split("/")
    if len(parts) == 2:
        try:
            return load(name)  # "owner/name"
        except (datasets.exceptions.DatasetNotFoundError, ValueError):
            return load(*parts)  # "name/configuration"
    if len(parts) == 3:
        return load("/".join(parts[:2]), parts[2])
    return load(name)
