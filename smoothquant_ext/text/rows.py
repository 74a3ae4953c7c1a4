"""Rows of data: which of their fields is the text, and what is said about it.

A row may hold a text, a conversation, or a question and its answer; conversations go through the tokenizer's chat
template. Names, addresses and languages are strings too, and no text.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import SmoothQuantError
from ..progress import say
from .chat import CONTENT_KEYS, ROLE_KEYS, ChatTemplate, Message, RefusedError, is_conversation, to_messages

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat")
SYSTEM = ("system", "system_prompt")
QUESTIONS = ("instruction", "prompt", "question", "query")
CONTEXTS = ("input", "context")  # what a question is about, which some datasets keep apart
ANSWERS = ("output", "response", "completion", "answer", "chosen")
TEXTS = ("text", "content")
# Of fields of any other name the only one with a string is the text, unless its name is one of these.
NOT_TEXT = re.compile(
    r"(.*_)?(u?u?id|guid|ids|key|index|idx|url|uri|link|source|src|origin|lang(uage)?|locale|date|time(stamp)?|license|"
    r"path|file(_?name)?|name|title|author|hash|md5|sha\d*|digest|model|split|category|type|kind|topic|subset|dataset|"
    r"meta(data)?|tags?|labels?|score|role|domain|version|status|format|encoding)",
    re.IGNORECASE,
)
WORD_STARTS = re.compile(r"(?<=[a-z\d])(?=[A-Z])|[-. ]")  # docId, doc-id
SURROGATES = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """A text; of a conversation with all that the chat template writes, to its end."""

    text: str = ""
    is_conversation: bool = False


def joined(documents: Iterable[Document]) -> str:
    """Texts with a blank line between them; a conversation follows another as the chat template ends it."""
    parts: list[str] = []
    for document in documents:
        parts += (document.text, "") if document.is_conversation else (document.text.strip("\n"), "\n\n")
    return "".join(parts[:-1])


class Rows:
    """Turns rows into documents, and counts what it reads and what it leaves out."""

    def __init__(self, name: str, tokenizer: Any = None, field: str | None = None) -> None:
        """Takes the name of the source, a tokenizer for conversations, and the field to read if it cannot be told."""
        self.name, self.field, self.template = name, field, ChatTemplate(tokenizer)
        self.read: Counter[tuple[str, bool]] = Counter()  # by the fields, and whether they are a conversation
        self.empty = self.refused = 0
        self.reason = ""

    def document(self, row: Any, where: str) -> Document:
        """The text of a row; empty where it has none.

        Raises:
            SmoothQuantError: it cannot be told which field is the text, or it is none.
        """
        if isinstance(row, str):
            return Document(encodable(row))
        if is_conversation(row):
            row = {"messages": row}
        if not isinstance(row, Mapping):
            raise SmoothQuantError(
                f"{where}, is not a JSON object: give one object a line, with the text in its field 'text'"
            )
        row = {str(name): _unzipped(value) for name, value in row.items()}
        if self.field is not None:
            return self._of_field(row, self.field, where)
        has_room = False
        for names, value in _candidates(row, where):
            if value:
                return self._text(names, value, row)
            has_room = True
        named = _for_text(row)
        if has_room or (named and not any(row[name] for name in named)):
            self.empty += 1
            return Document()
        fields = ", ".join(map(repr, row)) or "none"
        raise SmoothQuantError(
            f"{where}, has no string field 'text' (its fields: {fields}): rename the field of the text to 'text', "
            "or name it with --text-field"
        )

    def _of_field(self, row: Mapping[str, Any], field: str, where: str) -> Document:
        if field not in row:
            fields = ", ".join(map(repr, row)) or "none"
            raise SmoothQuantError(f"{where}, has no field {field!r} (its fields: {fields}): name another")
        value = row[field]
        if not value:
            self.empty += 1
            return Document()
        if not isinstance(value, str) and not is_conversation(value):
            raise SmoothQuantError(f"{where}, has no text in its field {field!r}, but a {type(value).__name__}")
        return self._text((field,), value if isinstance(value, str) else to_messages(value, where), row)

    def _text(self, names: tuple[str, ...], value: str | list[Message], row: Mapping[str, Any]) -> Document:
        if isinstance(value, str):
            self.empty += not value.strip()
            self.read[_listed(names), False] += bool(value.strip())
            return Document(encodable(value))
        try:
            tools = row.get("tools")
            text = self.template.text(value, tools if isinstance(tools, list) else None)
        except RefusedError as error:
            self.refused += 1
            self.reason = self.reason or str(error)
            return Document()
        self.read[_listed(names), True] += 1
        return Document(encodable(text), self.template.exists)

    def conclude(self) -> None:
        """Says which fields were read, and warns of what was left out.

        Raises:
            SmoothQuantError: the chat template refused all there is.
        """
        whole = sum(self.read.values())
        if self.refused and not whole:
            raise SmoothQuantError(
                f"the tokenizer's chat template refuses every conversation of {self.name} ({self.reason}): "
                "give conversations in its form, or text"
            )
        if whole:
            by = " by the chat template" if self.template.exists else ""
            parts = [f"{fields} of {n} rows{by if is_chat else ''}" for (fields, is_chat), n in self.read.items()]
            say(f"{self.name}: read {', '.join(parts)}{self._rest()}")
        if not self.template.exists and any(is_chat for _, is_chat in self.read):
            warnings.warn(
                f"there is no chat template: the conversations of {self.name} are read as plain text, "
                "one message after the other",
                stacklevel=2,
            )
        if self.refused:
            warnings.warn(
                f"the tokenizer's chat template refuses {self.refused} conversations of {self.name} ({self.reason}): "
                "they are left out",
                stacklevel=2,
            )

    def _rest(self) -> str:
        parts = [f"{self.empty} rows have no text"] if self.empty else []
        if self.template.trimmed:
            parts.append(f"{self.template.trimmed} conversations are read from the first message of the user")
        return "".join(f"; {part}" for part in parts)


def encodable(text: str) -> str:
    """The text with half characters, which JSON can spell and no tokenizer takes, replaced as decoders do."""
    return SURROGATES.sub("\ufffd", text) if SURROGATES.search(text) else text


def _candidates(row: Mapping[str, Any], where: str) -> Iterator[tuple[tuple[str, ...], str | list[Message]]]:
    """The readings of a row, the plainest first: the names of fields and what they hold."""
    if isinstance(row.get("text"), str):
        yield ("text",), row["text"] if row["text"].strip() else ""
    for name in CONVERSATIONS:
        if is_conversation(row.get(name)):
            yield (name,), _with_system(row, to_messages(row[name], where))
    yield from _exchanges(row, where)
    if isinstance(row.get("content"), str):
        yield ("content",), row["content"] if row["content"].strip() else ""
    other = [name for name in row if is_conversation(row[name]) and isinstance(row[name][0], Mapping)]
    if len(other) == 1:
        yield (other[0],), to_messages(row[other[0]], where)
    strings = [name for name in _for_text(row) if isinstance(row[name], str)]
    if len(strings) == 1:
        yield (strings[0],), row[strings[0]] if row[strings[0]].strip() else ""


def _exchanges(row: Mapping[str, Any], where: str) -> Iterator[tuple[tuple[str, ...], list[Message]]]:
    """A question and its answer, each a string or messages."""
    question = next((name for name in QUESTIONS if row.get(name)), None)
    answer = next((name for name in ANSWERS if name in row), None)
    if question is None or answer is None:
        return
    context = next((name for name in CONTEXTS if isinstance(row.get(name), str) and row[name].strip()), None)
    names = tuple(name for name in (question, context, answer) if name is not None)
    if is_conversation(row[question]) and is_conversation(row[answer]):
        yield names, to_messages([*row[question], *row[answer]], where)
    elif is_conversation(row[question]) and isinstance(row[answer], str):
        yield names, to_messages([*row[question], {"role": "assistant", "content": row[answer]}], where)
    elif is_conversation(row[answer]):
        yield (answer,), to_messages(row[answer], where)
    elif isinstance(row[question], str) and isinstance(row[answer], (str, type(None))):
        asked = row[question] if context is None else f"{row[question]}\n\n{row[context]}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row[answer]}]
        yield names, _with_system(row, to_messages(turns, where))


def _for_text(row: Mapping[str, Any]) -> list[str]:
    """The fields that may be text, by their names."""
    return [name for name in row if not NOT_TEXT.fullmatch(WORD_STARTS.sub("_", name))]


def _unzipped(value: Any) -> Any:
    """Messages one by one, which some datasets keep as a list of roles beside a list of contents."""
    if not isinstance(value, Mapping):
        return value
    keys = [
        next((key for key in names if isinstance(value.get(key), list)), None) for names in (ROLE_KEYS, CONTENT_KEYS)
    ]
    if None in keys or len({len(value[key]) for key in keys}) > 1:
        return value
    return [
        dict(zip(("role", "content"), pair, strict=True)) for pair in zip(*(value[key] for key in keys), strict=True)
    ]


def _with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, with the system prompt that some datasets keep apart."""
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), None)
    if system is None or not messages or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))
