"""The shapes of messages, of the items of ``/v1/responses`` and of tools. Each check returns what is wrong, as the end
of a sentence that begins with the name of the field, or ``None``.
"""

from __future__ import annotations

import json
from typing import Any

TEXT = ("text", "input_text", "output_text")
# What a part of a message holds besides text -> the key of its content, and the types that it may have.
MEDIA: dict[str, tuple[str, tuple[type, ...]]] = {
    "image_url": ("image_url", (str, dict)),
    "input_image": ("image_url", (str, dict)),
    "input_audio": ("input_audio", (str, dict)),
    "audio_url": ("audio_url", (dict,)),
    "video_url": ("video_url", (dict,)),
}
READ = ("role", "content", "tool_calls", "tool_call_id")
# transformers drops these, which are in the answers that clients send back.
DROPPED = ("refusal", "annotations", "audio", "function_call", "reasoning", "reasoning_content", "id", "status", "type")
LONGEST = 60  # characters of a value in a sentence


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def check_messages(messages: Any, text_only: bool) -> str | None:
    """The messages of ``/v1/chat/completions``."""
    if not messages:
        return " is an empty list, expected at least one message"
    return _first(messages, _message, text_only)


def check_input(items: Any, text_only: bool) -> str | None:
    """The input of ``/v1/responses``: a text, the parts of one message, or a conversation."""
    if isinstance(items, str):
        return None
    if not items:
        return " is an empty list, expected a text or at least one item"
    if isinstance(items[0], dict) and items[0].get("type") in ITEMS and "role" not in items[0]:
        return f"[0] is {shown(items[0]['type'])}, expected a message to begin with"  # transformers would drop it
    one_message = isinstance(items[0], dict) and "role" not in items[0]
    return _first(items, _part if one_message else _item, text_only)


def check_tools(tools: Any, text_only: bool = True) -> str | None:
    """Tools of both routes: nested under ``function``, or flat."""
    return _first(tools, _tool, text_only)


def _first(values: list[Any], look: Any, text_only: bool) -> str | None:
    for index, value in enumerate(values):
        wrong = look(value, text_only) if isinstance(value, dict) else f" is {shown(value)}, expected an object"
        if wrong:
            return f"[{index}]{wrong}"
    return None


def _message(message: dict[str, Any], text_only: bool) -> str | None:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if not isinstance(role, str) or not role:
        return f".role is {shown(role)}, expected a text such as 'user'"
    for key, value in message.items():
        if key not in (*READ, *DROPPED) and value is not None and (role, key) != ("tool", "name"):
            return f" has no place for {shown(key)}; it takes {', '.join(READ)}"
    if calls is not None:
        if not isinstance(calls, list):
            return f".tool_calls is {shown(calls)}, expected a list"
        if wrong := _first(calls, _call, text_only):
            return f".tool_calls{wrong}"
    if isinstance(content, str) or (content is None and calls):
        return None
    if not isinstance(content, list) or not content:
        return f".content is {shown(content)}, expected a text or a list of parts"
    wrong = _first(content, _part, text_only)
    return f".content{wrong}" if wrong else None


def _part(part: dict[str, Any], text_only: bool) -> str | None:
    kind = part.get("type")
    if kind in TEXT:
        return None if isinstance(part.get("text"), str) else f".text is {shown(part.get('text'))}, expected a text"
    if not isinstance(kind, str) or kind not in MEDIA:
        return f".type is {shown(kind)}, expected one of {', '.join((*TEXT, *MEDIA))}"
    if text_only:
        return f" is {shown(kind)}, but the model reads text only"
    key, types = MEDIA[kind]
    value = part.get(key)
    inner = value.get("data" if kind == "input_audio" else "url") if isinstance(value, dict) else value
    right = isinstance(value, types) and isinstance(inner, str)
    return None if right else f".{key} is {shown(value)}, expected a URL"


def _call(call: dict[str, Any], _: bool) -> str | None:
    function = call.get("function")
    if not isinstance(function, dict):
        return f".function is {shown(function)}, expected an object"
    if not isinstance(function.get("name"), str):
        return f".function.name is {shown(function.get('name'))}, expected a text"
    return _arguments(function.get("arguments"), ".function.arguments")


def _arguments(arguments: Any, where: str) -> str | None:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        value = None
    return None if isinstance(value, dict) else f"{where} is {shown(arguments)}, expected a JSON object"


def _function_call(item: dict[str, Any], _: bool) -> str | None:
    for key in ("call_id", "name"):
        if not isinstance(item.get(key), str):
            return f".{key} is {shown(item.get(key))}, expected a text"
    return _arguments(item.get("arguments"), ".arguments")


def _function_output(item: dict[str, Any], text_only: bool) -> str | None:
    if not isinstance(item.get("call_id"), str):
        return f".call_id is {shown(item.get('call_id'))}, expected a text"
    output = item.get("output")
    if isinstance(output, str):
        return None
    if not isinstance(output, list):
        return f".output is {shown(output)}, expected a text"
    wrong = _first(output, _part, text_only)
    return f".output{wrong}" if wrong else None


def _reasoning(item: dict[str, Any], _: bool) -> str | None:
    content = item.get("content") or []
    right = isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )
    return None if right else f".content is {shown(content)}, expected a list of texts"


ITEMS = {"function_call": _function_call, "function_call_output": _function_output, "reasoning": _reasoning}


def _item(item: dict[str, Any], text_only: bool) -> str | None:
    kind = item.get("type")
    if "role" in item and kind in (None, "message"):
        return _message(item, text_only)
    if not isinstance(kind, str) or kind not in ITEMS:
        return f".type is {shown(kind)}, expected a message with a role or one of {', '.join(ITEMS)}"
    return ITEMS[kind](item, text_only)


def _tool(tool: dict[str, Any], _: bool) -> str | None:
    if tool.get("type") != "function":
        return f".type is {shown(tool.get('type'))}, expected 'function'"
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return f" is {shown(tool)}, expected a function with a name"
    parameters = function.get("parameters")
    right = parameters is None or isinstance(parameters, dict)
    return None if right else f" has the parameters {shown(parameters)}, expected a JSON schema"
