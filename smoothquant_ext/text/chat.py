"""Conversations: the forms that people keep them in, and their text in the form that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..compat import first_line
from ..errors import SmoothQuantError

Message = dict[str, Any]

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
# What the roles of chat templates are called in ShareGPT's and others' files.
ROLES = {
    "human": "user",
    "prompter": "user",
    "question": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "developer": "system",
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")  # templates read them

# Templates such as Llama 3's write today's date unless told one: the same data would give other windows tomorrow.
FIXED = {"date_string": "01 Jan 2026"}


class RefusedError(Exception):
    """A chat template refuses a conversation."""


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, or of the texts of two who take turns."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if all(isinstance(item, str) for item in value):
        return len(value) > 1
    return all(isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS) for item in value)


def to_messages(value: Sequence[Any], where: str) -> list[Message]:
    """A conversation as messages with a role and a text.

    Args:
        value: messages with ``role`` and ``content``, or ``from`` and ``value``; or texts, the first one the user's.
        where: names the conversation in an error.

    Returns:
        The messages that say something; parts of a message that are no text, such as images, are left out.

    Raises:
        SmoothQuantError: a message has no role.
    """
    messages = [_message(item, number, where) for number, item in enumerate(value)]
    return [message for message in messages if message["content"].strip() or message.keys() - {"role", "content"}]


def _message(item: Any, number: int, where: str) -> Message:
    if isinstance(item, str):
        return {"role": ("user", "assistant")[number % 2], "content": item}
    role = next((item[key] for key in ROLE_KEYS if isinstance(item.get(key), str)), None)
    if role is None:
        raise SmoothQuantError(
            f"{where}, has a message without a role, number {number + 1}: give each 'role' and 'content'"
        )
    content = next((item[key] for key in CONTENT_KEYS if item.get(key) is not None), "")
    extra = {key: item[key] for key in KEPT if item.get(key)}
    return {"role": ROLES.get(role.lower(), role.lower()), "content": _text_of(content)} | extra


def _text_of(content: Any) -> str:
    """The text of a message; of several parts those that are text."""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, (str, Mapping))
        ]
        return "".join(text for text in texts if isinstance(text, str))
    return json.dumps(content, ensure_ascii=False)  # what a tool returned


class ChatTemplate:
    """The chat template of a tokenizer, or where there is none the messages one after the other.

    Attributes:
        exists: whether the tokenizer has one.
        trimmed: how many conversations lost answers at their start, which the template refuses.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        self.trimmed = 0

    def text(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text of a conversation.

        Raises:
            RefusedError: the template refuses it, also when it begins with the user, whose turns alternate with the
                assistant's, and has no system message.
        """
        if not self.exists:
            return "\n\n".join(message["content"] for message in messages)
        try:
            return self._apply(messages, tools)
        except RefusedError:
            plain = _alternating(messages)
            first = next((at for at, message in enumerate(plain) if message["role"] != "assistant"), len(plain))
            if not plain[first:]:
                raise
            text = self._apply(plain[first:], tools)
            self.trimmed += first > 0
            return text

    def _apply(self, messages: Sequence[Message], tools: Any) -> str:
        """Some templates read a text as content, some a list of parts, and say nothing of the other."""
        text = self._render(messages, tools)
        found = _found(messages, text)
        if found == len(messages):
            return text
        parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
        try:
            other = self._render(parts, tools)
        except RefusedError:
            return text
        return other if _found(messages, other) > found else text

    def _render(self, messages: Sequence[Message], tools: Any) -> str:
        options: dict[str, Any] = {"tools": tools} if tools else {}
        try:
            text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **FIXED, **options)
        except Exception as error:  # templates are programs of others
            raise RefusedError(first_line(error)) from error
        return text


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """The same without a system role, its text at the start of the user's, and with turns of one role in one."""
    merged: list[Message] = []
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if merged and merged[-1]["role"] == role:
            texts = [merged[-1]["content"], message["content"]]
            merged[-1] = merged[-1] | message | {"role": role, "content": "\n\n".join(filter(None, texts))}
        else:
            merged.append(message | {"role": role})
    return merged


def _found(messages: Sequence[Message], text: str) -> int:
    return sum(message["content"].strip() in text for message in messages)
