"""The tables of what a request may hold, without a server."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from bad_requests import BROKEN, CHAT, FUNCTION, IMAGE, LEGACY, REFUSED, REFUSED_IN_A_BATCH, RESPONSES, RIGHT
from tiny import VOCAB

from smoothquant_ext.integrations.request_checks import ROUTES, Refusal, Served, check, parse

TEXT = Served("model", "{{ messages }}", frozenset({"tokenize"}), VOCAB)
GREEDY = replace(TEXT, sampling={"temperature": 0.0, "top_p": 1.0, "do_sample": 0.0, "repetition_penalty": 1.0})
ABLE = replace(TEXT, template="{{ tools }}{{ messages }}", text_only=False)
# Refused later, by the number of their tokens or by the template.
OF_TOKENS = ("the prompt is empty", "the prompt has", "shorten it", "or fewer", "refuses these messages")


def refusal(route: str, change: dict[str, Any], served: Served) -> str:
    with pytest.raises(Refusal) as raised:
        check(route, parse(json.dumps(RIGHT[route] | change).encode()), served)
    body = raised.value.body()["error"]
    assert (raised.value.status, body["type"], body["code"]) == (400, "invalid_request_error", None)
    assert body["param"] is None or body["message"].startswith((body["param"], route))
    return str(body["message"])


def test_every_bad_request_is_refused_by_its_table() -> None:
    for route, change, words in REFUSED:
        if not any(token in words for token in OF_TOKENS):
            assert words in refusal(route, change, TEXT), (route, change)
    for route, change, words in REFUSED_IN_A_BATCH:
        assert words in refusal(route, change, GREEDY), (route, change)
    for raw, words in BROKEN:
        with pytest.raises(Refusal) as raised:
            parse(raw)
        assert words in raised.value.message


def test_what_the_model_can_do_is_passed_on_unchanged() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "5"},
    ]
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": "https://a/b.png"}]},
        {"type": "reasoning", "id": "r", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "5"},
    ]
    for route, change in (
        (CHAT, {"messages": talk, "tools": [FUNCTION], "tool_choice": "auto", "seed": 2**64 - 1, "stop": list("abcd")}),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": False}, "generation_config": '{"top_k": 5}'}),
        (RESPONSES, {"input": items, "tools": [{"type": "function", "name": "f"}], "stream": True}),
        (LEGACY, {"temperature": 2, "top_p": 0, "logit_bias": {"95": -100}, "max_tokens": 10**12, "seed": -(2**63)}),
        (LEGACY, {"temperature": 1e-6}),
    ):
        body = RIGHT[route] | change
        assert check(route, parse(json.dumps(body).encode()), ABLE) == body


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "[0].image_url is null, expected a URL"),
        ({"type": "image_url", "image_url": {"link": "x"}}, "expected a URL"),
        ({"type": "input_audio", "input_audio": {"url": "x"}}, "expected a URL"),
        ({"type": "video_url", "video_url": "x"}, "expected a URL"),
        ({"type": ["text"], "text": "x"}, '[0].type is ["text"]'),
    ],
)
def test_parts_that_a_model_for_images_cannot_read(part: Any, words: str) -> None:
    assert words in refusal(CHAT, {"messages": [{"role": "user", "content": [part]}]}, ABLE)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "[1].call_id is null"),
        ({"type": "function_call", "call_id": "1", "name": "f", "arguments": "x"}, "[1].arguments is"),
        ({"type": "function_call_output", "output": "x"}, "[1].call_id is null"),
        ({"type": "function_call_output", "call_id": "1"}, "[1].output is null"),
        ({"type": "function_call_output", "call_id": "1", "output": [5]}, "[1].output[0] is 5"),
        ({"type": "reasoning", "content": [{}]}, "[1].content is"),
        ({"role": "user", "type": "reasoning", "content": "x"}, "[1].content is"),
        ({"role": "user", "type": "thought", "content": "x"}, '[1].type is "thought"'),
    ],
)
def test_items_of_a_conversation_that_are_not_whole(item: Any, words: str) -> None:
    assert words in refusal(RESPONSES, {"input": [{"role": "user", "content": "x"}, item]}, ABLE)


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-7])
def test_a_temperature_that_overflows_is_refused(temperature: float) -> None:
    assert "expected 0 or a number between 1e-06 and 2" in refusal(LEGACY, {"temperature": temperature}, TEXT)


def test_tools_that_must_not_be_called_are_left_out() -> None:
    body = RIGHT[CHAT] | {"tools": [FUNCTION], "tool_choice": "none"}
    assert check(CHAT, body, TEXT) == RIGHT[CHAT] | {"tool_choice": "none"}


def test_a_tokenizer_that_cannot_stream_says_so() -> None:
    slow = replace(TEXT, streams=False)
    assert "cannot decode token by token" in refusal(LEGACY, {"stream": True}, slow)
    assert check(LEGACY, RIGHT[LEGACY] | {"stream": False}, slow)["stream"] is False


def test_one_batch_has_one_sampling() -> None:
    warm = replace(TEXT, sampling={"temperature": 0.6, "top_p": 0.9, "do_sample": 1.0, "repetition_penalty": 1.0})
    for change in ({"temperature": 0.6, "top_p": 0.9}, {"temperature": None}):
        assert check(LEGACY, parse(json.dumps(RIGHT[LEGACY] | change).encode()), warm)
    for change, words in (
        ({"temperature": 0}, "temperature is 0, but under --continuous-batching it is 0.6"),
        ({"temperature": 0.6, "top_p": 1}, "top_p is 1, but under --continuous-batching it is 0.9"),
        ({"temperature": 0.6, "seed": 1}, "seed has no effect under --continuous-batching"),
        ({"temperature": 0.6, "generation_config": '{"top_k": 3}'}, "top_k is 3"),
    ):
        assert words in refusal(LEGACY, change, warm)
    # A greedy answer depends on neither of these.
    assert check(LEGACY, RIGHT[LEGACY] | {"top_p": 0.5, "seed": 3}, GREEDY)


def test_loading_the_served_model_again_is_the_only_loading() -> None:
    assert check("/load_model", {}, TEXT) == {"model": "model"}
    with pytest.raises(Refusal, match="has 'model' only"):
        check("/load_model", {"model": "other"}, TEXT)
    assert set(ROUTES) == {LEGACY, CHAT, RESPONSES, "/load_model"}
