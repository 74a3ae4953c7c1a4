"""Files of rows and encodings as people have them: the same texts from each, or a sentence that names the file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_text import CHATML, tiny_tokenizer

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.text import read_text

TEXTS = ['Grüße, "from" afar', "two\nlines", "三"]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def table(delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "id"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


FILES = {
    "a.jsonl": LINES,
    "crlf.jsonl": LINES.replace("\n", "\r\n"),
    "mark.jsonl": "\ufeff" + LINES,
    "marks.jsonl": LINES.replace("\n", "\n\ufeff"),  # files with a mark each, joined
    "blank.jsonl": f"\n{LINES}\n\n",
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16be.jsonl": b"\xfe\xff" + LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "list.jsonl": json.dumps(ROWS, indent=1),
    "A.JSON": json.dumps(ROWS),
    "strings.json": json.dumps(TEXTS),
    "lines.json": LINES,
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.json.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.csv.xz": lzma.compress(table(",").encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_form_are_the_same_texts(name: str, tmp_path: Path) -> None:
    content = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_text(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "stream.arrow", "file.arrow"])
def test_tables_of_arrow(kind: str, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    path, rows = tmp_path / f"a.{kind}", pyarrow.Table.from_pylist(ROWS)
    if kind == "parquet":
        parquet.write_table(rows, path)
    else:
        new = pyarrow.ipc.new_stream if kind.startswith("stream") else pyarrow.ipc.new_file
        with new(str(path), rows.schema) as sink:
            sink.write_table(rows)
    assert read_text(path) == TEXTS
    path.write_bytes(path.read_bytes()[:-20][:60])
    with pytest.raises(SmoothQuantError, match=r"a\.\S+ cannot be read .*: it is damaged or of another format"):
        read_text(path)


def test_conversations_in_a_parquet_file(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"conversations": turns}]), tmp_path / "a.parquet")
    assert read_text(tmp_path / "a.parquet", tokenizer=tiny_tokenizer(chat_template=CHATML)) == [
        "[user]hi[assistant]ho"
    ]


def test_a_single_object_is_a_row_and_a_huge_line_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(ROWS[1]))
    assert read_text(tmp_path / "one.json") == [TEXTS[1]]
    long = "word " * 400_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": long}))
    (tmp_path / "long.csv").write_text(f"text\n{long}\n")
    assert read_text(tmp_path / "long.jsonl") == read_text(tmp_path / "long.csv") == [long]
    assert csv.field_size_limit() < len(long)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("half.txt", b"\xff\xfea", r"half\.txt is not UTF-8 text, nor the UTF-16 that it begins as \(byte"),
        ("unmarked.txt", "text".encode("utf-16-le"), r"unmarked\.txt is not UTF-8 text \(byte 1 is 0\)"),
        ("half.json", '[{"text": "a"}, {"te', r"half\.json is not JSON .*: give a list of rows"),
        ("empty.json", "", r"empty\.json is not JSON"),
        ("number.json", "5", r"number\.json is a single int: give a list of rows"),
        ("nothing.json", "[]", r"nothing\.json is empty"),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl, line 1, is not JSON"),
        ("half.jsonl.gz", FILES["a.jsonl.gz"][:-9], r"half\.jsonl\.gz cannot be decompressed .*: it is"),
        ("fake.txt.bz2", b"text", r"fake\.txt\.bz2 cannot be decompressed"),
        ("fake.txt.xz", b"text", r"fake\.txt\.xz cannot be decompressed"),
        ("a.jsonl.zst", b"x", r"a\.jsonl\.zst is neither text nor rows of text"),
        ("a.parquet", b"text", r"a\.parquet cannot be read"),
        ("row.json", '[{"text": "a"}, {"id": "x"}]', r"row\.json, row 2, has no string field 'text'"),
        ("row.csv", "text,id\na,1\n,\n\"b\nc\",3\n", None),
    ],
)  # fmt: skip
def test_files_that_are_damaged_are_named(name: str, content: Any, complaint: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if complaint is None:
        assert read_text(tmp_path / name) == ["a", "b\nc"]
        return
    with pytest.raises(SmoothQuantError, match=complaint) as caught:
        read_text(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_folder_says_what_of_it_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "second"}'))
    (tmp_path / "c.csv").write_text("text\nthird\n")
    (tmp_path / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"with the ending \.csv, \.json are not read: give them by name"):
        assert read_text(tmp_path) == ["first", "second"]


def test_a_folder_of_lists_alone_says_to_give_one(tmp_path: Path) -> None:
    (tmp_path / "sharegpt.json").write_text(json.dumps(ROWS))
    with pytest.raises(SmoothQuantError, match=r"no .txt, .md or .jsonl file: give one of its .* \S+sharegpt\.json"):
        read_text(tmp_path)


def test_a_dataset_saved_by_datasets_is_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"\.json are not read"):
        assert read_text(tmp_path / "saved") == TEXTS


def test_a_table_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        SmoothQuantError, match=r"a\.parquet needs the package pyarrow to be read: run pip install datasets"
    ):
        read_text(tmp_path / "a.parquet")
