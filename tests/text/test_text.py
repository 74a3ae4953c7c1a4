"""Text sources, hostile ones included, and the windows drawn from them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build
from tiny_text import some_text, tiny_tokenizer

from smoothquant_ext import SmoothQuantError
from smoothquant_ext.text import CHARACTERS_PER_TOKEN, read_text, token_windows

TOKENIZER = tiny_tokenizer()


def write(path: Any, text: str | bytes) -> Any:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "Grüße\n\nfrom afar", ["Grüße\n\nfrom afar"]),
        ("bom.txt", b"\xef\xbb\xbfmarked", ["marked"]),
        ("no_suffix", "plain", ["plain"]),
        ("a.jsonl", '{"text": "one", "id": "x"}\n\n{"text": "two"}\n', ["one", "two"]),
        ("only.jsonl", '{"content": "one", "id": 7}', ["one"]),
        ("strings.jsonl", '"one"\n"two"', ["one", "two"]),
        ("blank.jsonl", '{"text": "  "}\n{"text": "two"}', ["two"]),
        ("separator.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False), ["a\u2028b"]),
    ],
)
def test_files_are_read(tmp_path, name, content, expected):
    assert read_text(write(tmp_path / name, content)) == expected


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.md", "first")
    write(tmp_path / "sub" / "c.JSONL", '{"text": "third"}')
    write(tmp_path / "config.json", "{}")
    assert read_text(tmp_path) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", "", r"empty\.txt is empty"),
        ("spaces.txt", " \n\t\n", r"spaces\.txt is empty"),
        ("empty.jsonl", "\n\n", r"empty\.jsonl is empty"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 text \(byte 3\)"),
        ("broken.jsonl", '{"text": "ok"}\n{"text": ', r"broken\.jsonl, line 2, is not JSON"),
        ("list.jsonl", "[1, 2]", r"list\.jsonl, row 1, is not a JSON object"),
        (
            "two.jsonl",
            '{"left": "a", "right": "b"}',
            r"no string field 'text' \(its fields: 'left', 'right'\): .* name it with --text-field",
        ),
        ("none.jsonl", '{"id": 3}', r"no string field 'text' \(its fields: 'id'\)"),
        ("nothing.jsonl", "{}", r"no string field 'text' \(its fields: none\)"),
        ("table.csv", "a,b", r"table\.csv is empty"),
        ("archive.zip", b"PK", r"archive\.zip is neither text nor rows of text"),
        ("archive.gz", b"\x1f\x8b", r"archive\.gz cannot be decompressed .*: it is damaged or cut off"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, complaint):
    with pytest.raises(SmoothQuantError, match=complaint):
        read_text(write(tmp_path / name, content))


@pytest.mark.parametrize("source", ["no/such/file.txt", "./missing", "/missing", "~/missing-by-far", "a.parquet"])
def test_a_missing_file_is_not_looked_up_on_the_hub(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SmoothQuantError, match="does not exist"):
        read_text(source)


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(SmoothQuantError, match=r"a\.txt cannot be read: Permission denied"):
        read_text(path)


def test_a_folder_without_text_is_named(tmp_path):
    write(tmp_path / "weights.bin", "x")
    with pytest.raises(SmoothQuantError, match=r"holds no \.txt, \.md or \.jsonl"):
        read_text(tmp_path)


class NotFoundError(FileNotFoundError):
    pass


def fake_datasets(known: dict[tuple[str, ...], Any], offline: bool = False) -> Any:
    """A stand-in for the package: ``known`` maps the names given to load_dataset to rows."""
    calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []

    def load_dataset(*names: str, **options: Any) -> Any:
        calls.append((names, options))
        if names not in known:
            raise NotFoundError(f"Dataset '{names[0]}' doesn't exist on the Hub\nmore words")
        if isinstance(known[names], Exception):
            raise known[names]
        return known[names]

    return SimpleNamespace(
        load_dataset=load_dataset,
        calls=calls,
        config=SimpleNamespace(HF_HUB_OFFLINE=offline),
        exceptions=SimpleNamespace(DatasetNotFoundError=NotFoundError),
    )


@pytest.mark.parametrize(
    ("source", "names", "split"),
    [
        ("ptb", ("ptb",), "train"),
        ("owner/corpus:test", ("owner/corpus",), "test"),
        ("wikitext/wikitext-2-raw-v1:train[:10]", ("wikitext", "wikitext-2-raw-v1"), "train[:10]"),
        ("Salesforce/wikitext/wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test"),
    ],
)
def test_a_dataset_is_found_by_name_configuration_and_split(monkeypatch, source, names, split):
    module = fake_datasets({names: [{"text": "one"}, {"text": ""}, {"text": "two"}]})
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_text(source) == ["one", "two"]
    assert module.calls[-1] == (names, {"split": split, "streaming": True})


def test_of_a_dataset_no_more_is_read_than_is_used(monkeypatch):
    rows = iter([{"text": "x" * 100}] * 50)
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets({("big",): rows}))
    assert len(read_text("big", max_characters=250)) == 3
    assert len(list(rows)) == 47


def test_offline_the_cache_of_datasets_is_read(monkeypatch):
    module = fake_datasets({("corpus",): [{"text": "one"}]}, offline=True)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_text("corpus") == ["one"]
    assert module.calls[0][1]["streaming"] is False


@pytest.mark.parametrize(
    ("known", "complaint"),
    [
        (
            {},
            r"corpus is not a file here and cannot be read as a dataset \(Dataset 'corpus' doesn't exist on the Hub\)",
        ),
        ({("corpus",): ConnectionError("Couldn't reach 'corpus' on the Hub")}, r"Couldn't reach .* the network"),
        ({("corpus",): ValueError("Bad split: tset")}, "Bad split: tset"),
        ({("corpus",): RuntimeError()}, r"\(RuntimeError\)"),
        ({("corpus",): []}, "corpus is empty"),
        ({("corpus",): [{"a": "1", "b": "2"}]}, "row 1 of dataset corpus, has no string field 'text'"),
    ],
)
def test_a_bad_dataset_is_one_sentence(monkeypatch, known, complaint):
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(known))
    with pytest.raises(SmoothQuantError, match=complaint) as caught:
        read_text("corpus")
    assert "\n" not in str(caught.value)


def test_without_the_package_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SmoothQuantError, match="pip install datasets"):
        read_text("wikitext/wikitext-2-raw-v1:train")


@settings(max_examples=60, deadline=None)
@given(characters=st.integers(8, 400), samples=st.integers(1, 12), seqlen=st.integers(2, 8), seed=st.integers(0, 99))
@pytest.mark.filterwarnings("ignore:the text holds")
def test_windows_are_pieces_of_the_text_in_order_and_apart(characters, samples, seqlen, seed):
    text = some_text(characters)
    windows = token_windows(TOKENIZER, [text], samples, seqlen, seed)
    assert windows.dtype == torch.int64
    assert windows.shape == (min(samples, characters // seqlen), seqlen)
    end = 0
    for window in windows:
        start = text.index(TOKENIZER.decode(window), end)
        end = start + seqlen
    assert torch.equal(windows, token_windows(TOKENIZER, [text], samples, seqlen, seed))


def test_windows_are_spread_over_all_of_a_large_text_which_is_not_tokenized_whole():
    text = some_text(400_000)
    seen = []

    def counting(text: str, **options: Any) -> Any:
        seen.append(len(text))
        return TOKENIZER(text, **options)

    windows = token_windows(counting, [text], samples=8, seqlen=32)
    assert sum(seen) <= 2 * 8 * 32 * CHARACTERS_PER_TOKEN
    places = [text.index(TOKENIZER.decode(window)) for window in windows]
    stretch = 32 * CHARACTERS_PER_TOKEN
    for i, place in enumerate(places):
        assert 0 <= place - i * (len(text) - stretch) // 7 <= stretch


def test_seeds_give_other_windows():
    text = [some_text(5_000)]
    assert not torch.equal(token_windows(TOKENIZER, text, 4, 32, seed=0), token_windows(TOKENIZER, text, 4, 32, seed=1))


def test_a_large_text_of_which_a_part_has_few_tokens_is_tokenized_whole():
    class Words:
        """One token a word, none for white space: 99 % of this text gives no token."""

        def __call__(self, text: str, **_: Any) -> Any:
            return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    text = "word " * 200 + " " * 50_000
    assert token_windows(Words(), [text], samples=10, seqlen=4).shape == (10, 4)


def test_what_the_tokenizer_puts_before_a_text_is_put_before_each_window():
    windows = token_windows(tiny_tokenizer(bos=True), [some_text(1_000)], samples=5, seqlen=16)
    assert windows.shape == (5, 16)
    assert (windows[:, 0] == 1).all()
    assert (windows[:, 1:] > 2).all()


def test_too_little_text_gives_what_there_is_with_a_warning(tmp_path):
    path = write(tmp_path / "little.txt", some_text(70))
    with pytest.warns(UserWarning, match=r"little\.txt holds 2 windows of 32 tokens, not 16"):
        assert token_windows(TOKENIZER, path, samples=16, seqlen=32).shape == (2, 32)


def test_less_than_a_window_is_an_error_that_counts_the_tokens(tmp_path):
    path = write(tmp_path / "tiny.txt", some_text(31))
    with pytest.raises(SmoothQuantError, match=r"tiny\.txt has 31 tokens, fewer than one window of 32: give more text"):
        token_windows(TOKENIZER, path, samples=1, seqlen=32)


@pytest.mark.parametrize(("samples", "seqlen", "culprit"), [(0, 8, "samples is 0"), (4, 1, "seqlen is 1")])
def test_numbers_out_of_range_are_named(samples, seqlen, culprit):
    with pytest.raises(SmoothQuantError, match=culprit):
        token_windows(TOKENIZER, [some_text(100)], samples, seqlen)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "mpt"])
def test_windows_are_no_longer_than_the_positions_of_the_model(architecture):
    limit = {"max_seq_len" if architecture == "mpt" else "max_position_embeddings": 16}
    model = build(architecture, **limit)
    with pytest.warns(UserWarning, match="the model has 16 positions: windows have 16 tokens, not 32"):
        windows = token_windows(TOKENIZER, [some_text(400)], 4, 32, model=model)
    assert windows.shape == (4, 16)
    assert torch.equal(windows, token_windows(TOKENIZER, [some_text(400)], 4, 16))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_windows_of_models_without_a_table_of_positions_are_as_long_as_asked(architecture):
    settings = {} if architecture == "bloom" else {"max_position_embeddings": 16}
    assert token_windows(TOKENIZER, [some_text(400)], 4, 32, model=build(architecture, **settings)).shape == (4, 32)


def test_without_a_model_the_tokenizer_is_asked():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 16
    with pytest.warns(UserWarning, match="windows have 32 tokens, and the tokenizer speaks of 16 at most"):
        assert token_windows(tokenizer, [some_text(400)], 4, 32).shape == (4, 32)
