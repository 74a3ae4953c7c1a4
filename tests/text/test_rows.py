"""Rows of data: which field is the text, what is said about it, and what a row without text costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_text import CHATML, tiny_tokenizer

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.text import read_text
from smoothquant_ext.text.rows import Rows

TOKENIZER = tiny_tokenizer(chat_template=CHATML)
HI = "[user]hi[assistant]ho"
FOUND: dict[str, tuple[dict[str, Any], str, str]] = {
    "text": ({"text": "hi", "title": "t", "content": "c"}, "hi", "'text'"),
    "content": ({"content": "hi", "note": "n"}, "hi", "'content'"),
    "the only string": ({"article": "hi", "n": 3, "id": "7", "url": "u", "lang": "en"}, "hi", "'article'"),
    "camel case": ({"body": "hi", "docId": "7", "pageTitle": "t"}, "hi", "'body'"),
    "ShareGPT": ({"id": "7", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
                 HI, "'conversations'"),
    "messages": ({"source": "s", "messages": [{"role": "user", "content": "hi"},
                                              {"role": "assistant", "content": "ho"}]},
                 HI, "'messages'"),
    "UltraChat": ({"prompt": "hi", "prompt_id": "7", "messages": [{"role": "user", "content": "hi"},
                                                                  {"role": "assistant", "content": "ho"}]},
                  HI, "'messages'"),
    "capitals": ({"conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "ho"}]},
                 HI, "'conversations'"),
    "a system of its own": ({"system": "be", "conversations": [{"from": "human", "value": "hi"},
                                                               {"from": "gpt", "value": "ho"}]},
                            f"[system]be{HI}", "'conversations'"),
    "roles beside contents": ({"conversations": {"from": ["human", "gpt"], "value": ["hi", "ho"]}},
                              HI, "'conversations'"),
    "texts in turn": ({"conversation": ["hi", "ho"]}, HI, "'conversation'"),
    "another name": ({"thread": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "id": "7"},
                     HI, "'thread'"),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "ho"}, HI, "'instruction' and 'output'"),
    "Alpaca with input": ({"instruction": "hi", "input": "you", "output": "ho"}, "[user]hi\n\nyou[assistant]ho",
                          "'instruction' and 'input' and 'output'"),
    "Dolly": ({"instruction": "hi", "context": "you", "response": "ho", "category": "qa"},
              "[user]hi\n\nyou[assistant]ho", "'instruction' and 'context' and 'response'"),
    "OpenOrca": ({"id": "7", "system_prompt": "be", "question": "hi", "response": "ho"}, f"[system]be{HI}",
                 "'question' and 'response'"),
    "prompt and completion": ({"prompt": "hi", "completion": "ho"}, HI, "'prompt' and 'completion'"),
    "prompt and completion of messages": ({"prompt": [{"role": "user", "content": "hi"}],
                                           "completion": [{"role": "assistant", "content": "ho"}]},
                                          HI, "'prompt' and 'completion'"),
    "preferences": ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, HI, "'prompt' and 'chosen'"),
    "question and answer": ({"question": "hi", "answer": "ho"}, HI, "'question' and 'answer'"),
    "an answer that is null": ({"instruction": "hi", "output": None}, "[user]hi", "'instruction' and 'output'"),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FOUND)
def test_the_text_of_a_row_is_found_and_its_field_is_named(kind: str, tmp_path: Any, capsys: Any) -> None:
    row, expected, fields = FOUND[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read_text(path, tokenizer=TOKENIZER) == [expected]
    chat = " by the chat template" if expected.startswith("[") else ""
    assert capsys.readouterr().err == f"{path}: read {fields} of 1 rows{chat}\n"


@pytest.mark.parametrize("row", [
    {"id": "abc"}, {"url": "https://a.b"}, {"source": "web"}, {"lang": "en"}, {"id": "a", "source": "b", "n": 3},
    {"prompt_id": "a"}, {"docId": "a"}, {"title": "A title"}, {"left": "a", "right": "b"}, {"text": 5}, {"text": ["a"]},
    {"messages": 5}, {"messages": [{"who": "me", "says": "hi"}]}, {"n": 3},
])  # fmt: skip
def test_names_and_numbers_are_no_text(row: dict[str, Any]) -> None:
    with pytest.raises(SmoothQuantError, match=r"row 3, has no string field 'text' \(its fields: .*--text-field"):
        Rows("a", TOKENIZER).document(row, "row 3")


@pytest.mark.parametrize("row", [
    {"text": None}, {"text": ""}, {"text": " \n"}, {"text": None, "id": "7"}, {"body": None, "id": "7"},
    {"messages": []}, {"conversations": None}, {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": None}]}, {"instruction": None, "output": None}, {"content": "  "},
])  # fmt: skip
def test_rows_without_text_are_left_out_and_counted(row: dict[str, Any], tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row, {"text": "hi"}, row])))
    assert read_text(path, tokenizer=TOKENIZER) == ["hi"]
    assert capsys.readouterr().err == f"{path}: read 'text' of 1 rows; 2 rows have no text\n"
    path.write_text(json.dumps(row))
    with pytest.raises(SmoothQuantError, match=r"rows\.jsonl is empty"):
        read_text(path, tokenizer=TOKENIZER)


def test_mixed_rows_are_each_read_as_what_they_are(tmp_path: Any, capsys: Any) -> None:
    rows = [FOUND[kind] for kind in ("text", "ShareGPT", "Alpaca", "the only string")]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\r\n".join(json.dumps(row) for row, *_ in rows))
    assert read_text(path, tokenizer=TOKENIZER) == [text for _, text, _ in rows]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for _, text, fields in rows:
        assert f"{fields} of 1 rows{' by the chat template' if text.startswith('[') else ''}" in said


def test_a_field_can_be_named(tmp_path: Any) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(json.dumps({"left": "a", "right": "b", "text": "c", "n": 3, "none": None}))
    assert read_text(path, field="right") == ["b"]
    with pytest.raises(SmoothQuantError, match=r"two\.jsonl, line 1, has no field 'middle' \(its fields: 'left', "):
        read_text(path, field="middle")
    with pytest.raises(SmoothQuantError, match=r"line 1, has no text in its field 'n', but a int"):
        read_text(path, field="n")
    with pytest.raises(SmoothQuantError, match="is empty"):
        read_text(path, field="none")
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(SmoothQuantError, match=r"plain\.txt is text without fields: leave out --text-field left"):
        read_text(tmp_path / "plain.txt", field="left")


def test_one_broken_row_of_many_is_named_with_its_line(tmp_path: Any) -> None:
    path = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(10_000)]
    for broken, complaint in [
        ('{"text": "half', "is not JSON"),
        ('{"id": "x"}', "has no string field 'text'"),
        ("7", "is not a JSON object"),
    ]:
        path.write_text("\n".join([*lines[:7000], broken, *lines[7000:]]))
        with pytest.raises(SmoothQuantError, match=rf"many\.jsonl, line 7001, {complaint}"):
            read_text(path)


def test_half_characters_are_replaced() -> None:
    """No tokenizer takes them."""
    assert Rows("a").document({"text": "a\ud83dz"}, "row").text == "a\ufffdz"
    assert Rows("a").document({"text": "a\U0001f600z"}, "row").text == "a\U0001f600z"
