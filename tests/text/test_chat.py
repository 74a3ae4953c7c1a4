"""Conversations and chat templates that are choosy about them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tiny_text import CHATML, some_text, tiny_tokenizer

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.text import read_text, token_windows
from smoothquant_ext.text.documents import to_documents

STRICT = (  # as Gemma's and Mistral's
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}<{{ tools | length }} tools>{% endif %}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}<{{ c['function']['name'] }}>{% endfor %}{% endfor %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


SYSTEM, HI, HO, MORE = turn("system", "be"), turn("user", "hi"), turn("assistant", "ho"), turn("user", "more")


def text_of(messages: list[dict[str, Any]], template: str | None, **row: Any) -> str:
    (text,) = read_rows([{"messages": messages, **row}], template)
    return text


def read_rows(rows: list[dict[str, Any]], template: str | None) -> list[str]:
    return [text for text, _ in to_documents(rows, tiny_tokenizer(chat_template=template)) if text]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([HI, HO], "[user]hi[assistant]ho"),
        ([SYSTEM, HI, HO], "[user]be\n\nhi[assistant]ho"),
        ([SYSTEM, HO], "[user]be[assistant]ho"),
        ([HI, MORE, HO], "[user]hi\n\nmore[assistant]ho"),
        ([HI, HO, SYSTEM], "[user]hi[assistant]ho[user]be"),
        ([HO, HI, HO], "[user]hi[assistant]ho"),
        ([HI, HO, HO, MORE], "[user]hi[assistant]ho\n\nho[user]more"),
    ],
)
def test_a_strict_template_is_given_what_it_takes(messages: list[dict[str, Any]], expected: str, capsys: Any) -> None:
    assert text_of(messages, STRICT) == expected
    is_trimmed = messages[0] is HO
    assert ("1 conversations are read from the first message of the user" in capsys.readouterr().err) == is_trimmed


def test_a_lenient_template_is_given_the_conversation_as_it_is() -> None:
    assert text_of([HO, SYSTEM, HI, MORE], CHATML) == "[assistant]ho[system]be[user]hi[user]more"


def test_conversations_that_a_template_refuses_are_left_out_with_a_sentence() -> None:
    odd = [HI, turn("tool", "42"), HO]
    with pytest.warns(
        UserWarning, match=r"refuses 2 conversations of the text \(roles must alternate\): they are left out"
    ):
        assert read_rows([{"messages": odd}, {"messages": [HI, HO]}, {"messages": odd}], STRICT) == [
            "[user]hi[assistant]ho"
        ]
    with pytest.raises(SmoothQuantError, match=r"refuses every conversation of the text \(roles must alternate\)"):
        read_rows([{"messages": odd}], STRICT)


@pytest.mark.parametrize("template", ["{{ nothing.there }}", "{% for %}", "{{ messages[0]['content'] + 1 }}"])
def test_a_broken_template_is_one_sentence(template: str) -> None:
    with pytest.raises(SmoothQuantError, match="chat template refuses every conversation of the text") as caught:
        text_of([HI, HO], template)
    assert "\n" not in str(caught.value)


def test_without_a_template_messages_follow_one_another_with_a_sentence() -> None:
    with pytest.warns(
        UserWarning, match="there is no chat template: the conversations of the text are read as plain text"
    ):
        assert text_of([SYSTEM, HI, HO], None) == "be\n\nhi\n\nho"


PART_LISTS = {
    "text": [{"type": "text", "text": "hi"}],
    "texts": [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}],
    "strings": ["h", "i"],
    "an image": [{"type": "image", "url": "x"}, {"type": "text", "text": "hi"}],
}


@pytest.mark.parametrize("parts", PART_LISTS)
@pytest.mark.parametrize("template", [CHATML, STRICT, PARTS])
def test_lists_of_parts_are_read_whatever_the_template_reads(parts: str, template: str) -> None:
    assert text_of([turn("user", PART_LISTS[parts]), HO], template) == "[user]hi[assistant]ho"


def test_tools_and_their_calls_reach_the_template() -> None:
    call = {"function": {"name": "look", "arguments": "{}"}}
    messages = [HI, turn("assistant", None, tool_calls=[call]), turn("tool", {"found": 1}), HO]
    expected = '<1 tools>[user]hi[assistant]<look>[tool]{"found": 1}[assistant]ho'
    assert text_of(messages, TOOLS, tools=[{"type": "function"}]) == expected


@pytest.mark.parametrize("messages", [[HI, {"content": "x"}], [HI, {"role": None, "content": "x"}]])
def test_a_message_without_a_role_is_named(tmp_path: Any, messages: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": [HI]}, {"messages": messages}])))
    with pytest.raises(
        SmoothQuantError, match=r"chat\.jsonl, line 2, has (a message without a role, number 2|no string field)"
    ):
        read_text(path, tokenizer=tiny_tokenizer(chat_template=CHATML))


BOS_CHAT = "<s>" + CHATML


@pytest.mark.parametrize("seed", range(20))
def test_what_a_tokenizer_and_a_template_both_put_first_is_there_once(seed: int) -> None:
    tokenizer = tiny_tokenizer(bos=True, chat_template=BOS_CHAT)
    rows = [{"messages": [turn("user", some_text(4 + n % 5, seed=n))]} for n in range(60)]
    windows = token_windows(tokenizer, rows, samples=20, seqlen=14, seed=seed)
    assert windows.shape == (20, 14)
    assert (windows[:, 0] == 1).all()
    assert (windows == 1)[:, 2:].any(), "conversations in a window begin as the template says"
    assert not (windows[:, 1] == 1).any()


def test_conversations_follow_one_another_as_the_template_ends_them() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML + ".{{ '\\n' }}")
    mixed = ["\nfirst\n\n", [HI, HO], {"messages": [MORE, HO]}, "last\n"]
    expected = "first\n\n[user]hi[assistant]ho.\n[user]more[assistant]ho.\nlast"
    (window,) = token_windows(tokenizer, mixed, samples=1, seqlen=len(expected))
    assert tokenizer.decode(window) == expected
    plain = "first\n\nhi\n\nho\n\nmore\n\nho\n\nlast"
    with pytest.warns(UserWarning, match="no chat template"):
        (window,) = token_windows(tiny_tokenizer(), mixed, samples=1, seqlen=len(plain))
    assert tokenizer.decode(window) == plain


def test_windows_of_conversations_are_what_the_template_writes() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    (window,) = token_windows(tokenizer, [[HI, HO]], samples=1, seqlen=21)
    assert tokenizer.decode(window) == "[user]hi[assistant]ho"
    assert torch.equal(window, torch.tensor(tokenizer("[user]hi[assistant]ho").input_ids))


@pytest.mark.parametrize(("document", "kind"), [(None, "None"), (5, "of type int"), (b"x", "of type bytes")])
def test_documents_that_are_none_are_named(document: Any, kind: str) -> None:
    with pytest.raises(
        SmoothQuantError, match=f"document 2 is {kind}, expected a text, a row with its fields or messages"
    ):
        token_windows(tiny_tokenizer(), ["text", document], samples=1, seqlen=4)


def test_a_template_that_writes_the_date_gives_the_same_windows_every_day() -> None:
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    assert text_of([HI], f"{today}<{{{{ date_string }}}}>{CHATML}") == "<01 Jan 2026>[user]hi"
