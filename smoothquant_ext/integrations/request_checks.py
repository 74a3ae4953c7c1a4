"""What a request to the server may hold: one table of fields for each route, and the sentence for what does not fit.

transformers' server passes most values on unseen. A wrong one is then an error 500, ends the worker of continuous
batching, or is ignored although it would change the answer. So a field that is in no table here is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .message_checks import check_input, check_messages, check_tools, shown

Check = Callable[[Any], str | None]  # what was expected, or None if the value is right

BODY_BYTES = 64 << 20  # images come inside of the body
COLDEST = 1e-6  # temperature
STOPS = 4  # OpenAI's limit


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        message: one sentence for the client.
        param: the field that is wrong.
        status: the HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    def body(self) -> dict[str, Any]:
        """The body of the answer, in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


@dataclass(frozen=True)
class Served:
    """What requests may ask of the served model.

    Args:
        model: its name.
        template: its chat template, ``None`` without one.
        template_arguments: names that a request may not set in ``chat_template_kwargs``.
        vocabulary: number of tokens that it knows.
        text_only: whether it reads text only.
        streams: whether its tokenizer can decode an answer token by token.
        sampling: the sampling of all requests under continuous batching, as a sentence says it; ``None`` without.
    """

    model: str
    template: str | None
    template_arguments: frozenset[str]
    vocabulary: int
    text_only: bool = True
    streams: bool = True
    sampling: Mapping[str, float] | None = None


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"a number between {low:g} and {high:g}"

    return check


def _whole(low: int, high: int | None = None) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value
        if right and (high is None or value <= high):
            return None
        return f"a whole number of at least {low}" if high is None else f"a whole number between {low} and {high}"

    return check


def _kind(kind: type, name: str) -> Check:
    return lambda value: None if isinstance(value, kind) else name


def _only(*values: Any) -> Check:
    """For a field that transformers' server ignores: only values that ask for nothing are right."""
    expected = f"{' or '.join(json.dumps(value) for value in values)}, because this server supports nothing else"

    def check(value: Any) -> str | None:
        same = (value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)
        return None if any(same) else expected

    return check


def _stop(value: Any) -> str | None:
    values = value if isinstance(value, list) else [value]
    right = 1 <= len(values) <= STOPS and all(isinstance(each, str) and each for each in values)
    return None if right else f"a text or a list of 1 to {STOPS} texts that are not empty"


def _config(value: Any) -> str | None:
    """The JSON of a ``GenerationConfig``, which transformers' chat sends."""
    try:
        given = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        return "a text with a JSON object"
    for name, setting in given.items():
        check = CONFIG.get(name)
        if check is None:
            return f"a JSON object with none but {', '.join(CONFIG)}, not {shown(name)}"
        if setting is not None and (wrong := check(setting)):
            return f"for {name} {wrong}, not {shown(setting)}"
    return None


def _temperature(value: Any) -> str | None:
    """Logits divided by almost nothing overflow."""
    fits = _number(0, 2)(value) is None and (value == 0 or value >= COLDEST)
    return None if fits else f"0 or a number between {COLDEST:g} and 2"


_TRUTH = _kind(bool, "true or false")
_ANY: Check = lambda _: None  # noqa: E731 (an entry of a table)
_SEED = _whole(-(2**63), 2**64 - 1)  # what torch.manual_seed takes

CONFIG: dict[str, Check] = {
    "max_new_tokens": _whole(1),
    "do_sample": _TRUTH,
    "temperature": _temperature,
    "top_k": _whole(0),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "transformers_version": _ANY,
}
COMMON: dict[str, Check] = {
    "model": _ANY,  # compared with the served one
    "temperature": _temperature,
    "top_p": _number(0, 1),
    "seed": _SEED,
    "stream": _TRUTH,
    "generation_config": _config,
    # These do not change the answer.
    "metadata": _ANY,
    "prompt_cache_key": _ANY,
    "prompt_cache_retention": _ANY,
    "safety_identifier": _ANY,
    "service_tier": _ANY,
    "store": _ANY,
    "stream_options": _kind(dict, "an object"),  # the last part of a stream holds the usage in any case
    "user": _ANY,
}
LEGACY: dict[str, Check] = COMMON | {
    "frequency_penalty": _only(0),  # transformers would apply a penalty of another kind
    "logit_bias": _kind(dict, "an object of token ids and numbers"),
    "logprobs": _only(False),
    "max_tokens": _whole(1),
    "n": _only(1),
    "presence_penalty": _only(0),
    "stop": _stop,
}
CHAT: dict[str, Check] = {
    "chat_template_kwargs": _kind(dict, "an object"),
    "parallel_tool_calls": _only(True),
    "tool_choice": _only("auto", "none"),
    "tools": _kind(list, "a list"),
}

# Route -> its fields. Any other route that a client may post to is not served.
ROUTES: dict[str, dict[str, Check]] = {
    "/v1/completions": LEGACY
    | {
        "prompt": _kind(str, "one text: this server takes neither token ids nor lists"),
        "best_of": _only(1),
        "echo": _only(False),
        "suffix": _only(""),  # transformers would only append it to the answer
    },
    "/v1/chat/completions": LEGACY
    | CHAT
    | {
        "messages": _kind(list, "a list of messages"),
        "max_completion_tokens": _whole(1),
        "functions": _only([]),
        "modalities": _only(["text"]),
        "response_format": _only({"type": "text"}),
        "top_logprobs": _only(0),
    },
    "/v1/responses": COMMON
    | CHAT
    | {
        "input": lambda value: None if isinstance(value, str | list) else "a text or a list of items",
        "instructions": _kind(str, "a text"),
        "max_output_tokens": _whole(1),
        "background": _only(False),
        "include": _only([]),
        "text": _only({"format": {"type": "text"}}),
        "top_logprobs": _only(0),
        "truncation": _only("disabled"),
    },
    "/load_model": {"model": _ANY},
}
REQUIRED = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}
MAX_TOKENS = ("max_completion_tokens", "max_tokens", "max_output_tokens")  # the first one counts


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a body; fields that are null are left out, as if they were not there.

    Raises:
        Refusal: the body is no JSON object, or holds text that is not Unicode.
    """
    try:
        body = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refusal(f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(body, dict):
        raise Refusal(f"the body is {shown(body)}, expected a JSON object")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refusal("the body holds half of a surrogate pair, which is no character: send whole characters") from None
    except RecursionError:
        raise Refusal("the body is nested too deep") from None
    return {field: value for field, value in body.items() if value is not None}


def check(route: str, body: dict[str, Any], served: Served) -> dict[str, Any]:
    """The fields that count, with the defaults of OpenAI where transformers has others.

    Args:
        route: a key of ``ROUTES``.
        body: the fields of the request, as ``parse`` returns them.
        served: what may be asked.

    Raises:
        Refusal: a field is missing, unknown, of another type or out of range, or the model cannot do what it asks.
    """
    if "model" in body and body["model"] != served.model:
        raise Refusal(f"model is {shown(body['model'])}, but this server has {served.model!r} only", "model")
    fields = ROUTES[route]
    for field, value in body.items():
        if field not in fields:
            raise Refusal(f"{route} has no field {shown(field)} here; it takes {', '.join(fields)}", field)
        if wrong := fields[field](value):
            raise Refusal(f"{field} is {shown(value)}, expected {wrong}", field)
    required = REQUIRED.get(route)
    if required is None:  # /load_model, which answers that the model is loaded
        return {"model": served.model}
    if required not in body:
        raise Refusal(f"{required} is missing: {route} needs it", required)
    if "stream" in body and body["stream"] and not served.streams:
        raise Refusal("stream is true, but the tokenizer of this model cannot decode token by token", "stream")
    for each in (_check_chat, _check_bias, _check_batched):
        each(route, body, served)
    passed = dict(body)
    if passed.get("tool_choice") == "none":
        passed.pop("tools", None)
    if route == "/v1/responses":
        passed.setdefault("stream", False)  # transformers' default is a stream, OpenAI's is none
    return passed


def _check_chat(route: str, body: dict[str, Any], served: Served) -> None:
    if route == "/v1/completions":
        return
    if served.template is None:
        raise Refusal(
            f"{served.model} has no chat template, so it cannot answer {route}: send a prompt to /v1/completions"
        )
    for field, look in (("messages", check_messages), ("input", check_input), ("tools", check_tools)):
        if field in body and (wrong := look(body[field], served.text_only)):
            raise Refusal(f"{field}{wrong}", field)
    if body.get("tools") and body.get("tool_choice") != "none" and "tools" not in served.template:
        raise Refusal(f"tools are given, but the chat template of {served.model} has no place for them", "tools")
    for name in body.get("chat_template_kwargs", {}):
        if name in served.template_arguments:
            raise Refusal(f"chat_template_kwargs sets {name!r}, which the server sets", "chat_template_kwargs")


def _check_bias(_: str, body: dict[str, Any], served: Served) -> None:
    look = _number(-100, 100)
    for token, bias in body.get("logit_bias", {}).items():
        known = token.isascii() and token.isdigit() and len(token) < 10 and int(token) < served.vocabulary
        if not known or look(bias):
            raise Refusal(
                f"logit_bias holds {shown(token)}: {shown(bias)}, expected a token id below {served.vocabulary} and a "
                f"number between -100 and 100",
                "logit_bias",
            )


def _check_batched(_: str, body: dict[str, Any], served: Served) -> None:
    """Requests of one batch share their sampling; transformers would ignore what a single one asks for."""
    if served.sampling is None:
        return
    asked = {**json.loads(body.get("generation_config", "{}")), **body}
    for field in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample"):
        value, set_ = asked.get(field), served.sampling.get(field)
        idle = field in ("top_p", "top_k", "min_p") and served.sampling["temperature"] == 0
        if value is not None and not idle and float(value) != set_:
            raise Refusal(
                f"{field} is {shown(value)}, but under --continuous-batching it is {shown(set_)} for all requests: "
                f"leave it out, or serve with another --temperature or without --continuous-batching",
                field,
            )
    for field in ("seed", "stop", "logit_bias"):
        if body.get(field) not in (None, {}) and not (field == "seed" and served.sampling["temperature"] == 0):
            raise Refusal(f"{field} has no effect under --continuous-batching: leave it out, or serve without", field)
