"""Files of text and of rows: what their bytes hold, by the ending of their names."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SmoothQuantError

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
OTHER_FORMATS = {".zip", ".zst", ".tar", ".pdf", ".docx", ".bin", ".npy", ".npz", ".pt", ".safetensors", ".gguf"}

# The longer first: that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
LISTS = ("data", "rows", "examples", "train", "instances")  # where a JSON object has its rows, if it is not one itself

Row = tuple[str, Any]
"""Where a row is, and the row."""


def suffix_of(path: Path) -> str:
    """The ending of a file's name that says what is in it, after decompression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def in_folder(path: Path) -> bool:
    """Whether a file in a folder is read: those of JSON and tables are as often about the text as the text."""
    is_cache = path.name.startswith("cache-")  # of the package datasets, beside its data
    return suffix_of(path) in (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet", ".arrow") and not is_cache


def read_file(path: Path) -> str | Iterable[Row]:
    """The text of a file, or its rows.

    Raises:
        SmoothQuantError: the file cannot be read or decoded, or its format is another.
    """
    suffix = suffix_of(path)
    if suffix in OTHER_FORMATS or path.suffix.lower() in OTHER_FORMATS:
        raise SmoothQuantError(f"{path} is neither text nor rows of text: convert it to a .txt or .jsonl file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() in COMPRESSED:
        try:
            content = COMPRESSED[path.suffix.lower()](content)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise SmoothQuantError(f"{path} cannot be decompressed ({error}): it is damaged or cut off") from error
    if suffix in (".parquet", ".arrow"):
        return _arrow_rows(content, path)
    text = _decoded(content, path)
    if suffix in (*JSONL_SUFFIXES, ".json"):
        return _json_rows(text, path)
    return _table_rows(text, path) if suffix in (".csv", ".tsv") else text


def _decoded(content: bytes, path: Path) -> str:
    encoding = next((MARKS[mark] for mark in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        what = (
            "UTF-8 text"
            if encoding.startswith("utf-8")
            else f"UTF-8 text, nor the {encoding.upper()} that it begins as"
        )
        raise SmoothQuantError(f"{path} is not {what} (byte {error.start}): give a text or jsonl file") from error
    if "\0" in text:
        raise SmoothQuantError(f"{path} is not UTF-8 text (byte {text.index(chr(0))} is 0): give a text or jsonl file")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_rows(text: str, path: Path) -> list[Row]:
    """The rows of JSON lines, or of one JSON list; people name either .json and .jsonl."""
    lines = [(f"{path}, line {number}", line.lstrip("\ufeff")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    if suffix_of(path) == ".json" or (lines and lines[0][1].lstrip().startswith("[")):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if suffix_of(path) == ".json" and not _is_json(lines[0][1] if lines else ""):
                raise SmoothQuantError(f"{path} is not JSON ({error}): give a list of rows") from error
        else:
            return _rows_of(whole, path)
    return [(where, _parsed(line, where)) for where, line in lines]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SmoothQuantError(f"{where}, is not JSON ({error}): give one JSON object a line") from error


def _rows_of(whole: Any, path: Path) -> list[Row]:
    if isinstance(whole, dict):
        whole = next((whole[name] for name in LISTS if isinstance(whole.get(name), list)), [whole])
    if not isinstance(whole, list):
        raise SmoothQuantError(f"{path} is a single {type(whole).__name__}: give a list of rows")
    return [(f"{path}, row {number}", row) for number, row in enumerate(whole, 1)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _table_rows(text: str, path: Path) -> list[Row]:
    before = csv.field_size_limit(len(text) + 1)  # the default refuses long documents
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix_of(path) == ".tsv" else ",")
        rows = [(f"{path}, line {reader.line_num}", {k: v for k, v in row.items() if k is not None}) for row in reader]
    except csv.Error as error:
        raise SmoothQuantError(f"{path} is not a table ({error}): give a .csv file with a line of names") from error
    finally:
        csv.field_size_limit(before)
    return list(rows)


def _arrow_rows(content: bytes, path: Path) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise SmoothQuantError(f"{path} needs the package pyarrow to be read: run pip install datasets") from error
    source = pyarrow.BufferReader(content)
    try:
        if suffix_of(path) == ".parquet":
            table = pyarrow.parquet.read_table(source)
        elif content.startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(source).read_all()
        else:
            table = pyarrow.ipc.open_stream(source).read_all()
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SmoothQuantError(f"{path} cannot be read ({reason}): it is damaged or of another format") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]
