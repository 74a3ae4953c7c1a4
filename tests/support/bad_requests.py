"""Requests that a server must refuse: route, changes to a right request, words of the sentence that it must say."""

from __future__ import annotations

from typing import Any

LEGACY, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
POSITIONS = 512  # of the served model, whose tokenizer has one token a character
RIGHT: dict[str, dict[str, Any]] = {
    LEGACY: {"model": "model", "prompt": "once upon", "max_tokens": 6, "temperature": 0},
    CHAT: {"model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0},
    RESPONSES: {"model": "model", "input": "hello", "max_output_tokens": 6, "temperature": 0},
}


def _user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def _called(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
LENGTHS = [0, -1, 1.5, 1.0, "8", True, [8], 10**30, -(10**30), float("inf"), float("nan")]

# Both ways of serving refuse these.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # what to answer
    (LEGACY, {"prompt": ""}, "the prompt is empty"),
    (LEGACY, {"prompt": "", "stream": True}, "the prompt is empty"),
    (LEGACY, {"prompt": None}, "prompt is missing"),
    (LEGACY, {"prompt": []}, "takes neither token ids nor lists"),
    (LEGACY, {"prompt": [5, 6]}, "takes neither token ids nor lists"),
    (LEGACY, {"prompt": [[5]]}, "takes neither token ids nor lists"),
    (LEGACY, {"prompt": ["a", "b"]}, "takes neither token ids nor lists"),
    (LEGACY, {"prompt": 7}, "prompt is 7"),
    (LEGACY, {"prompt": "half \ud800 of a pair"}, "half of a surrogate pair"),
    (CHAT, {"messages": None}, "messages is missing"),
    (CHAT, {"messages": []}, "messages is an empty list"),
    (CHAT, {"messages": "hello"}, 'messages is "hello"'),
    (CHAT, {"messages": ["hello"]}, 'messages[0] is "hello", expected an object'),
    (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role is null"),
    (CHAT, {"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is 3"),
    (CHAT, _user(None), "messages[0].content is null"),
    (CHAT, _user(5), "messages[0].content is 5"),
    (CHAT, _user([]), "messages[0].content is []"),
    (CHAT, _user(["x"]), 'messages[0].content[0] is "x"'),
    (CHAT, _user([{"type": "text"}]), "messages[0].content[0].text is null"),
    (CHAT, _user([{"type": "text", "text": "x"}, IMAGE]), 'content[1] is "image_url", but the model reads text only'),
    (CHAT, _user([{"type": "smell"}]), 'content[0].type is "smell"'),
    (CHAT, _user("x", name="Ann"), 'messages[0] has no place for "name"'),
    (CHAT, _user("half \udfff"), "half of a surrogate pair"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "refuses these messages: no wizard here"),
    (CHAT, _called("{"), "tool_calls[0].function.arguments is"),
    (CHAT, _called(["a"]), "tool_calls[0].function.arguments is"),
    (CHAT, {"tools": [FUNCTION]}, "has no place for them"),
    (CHAT, {"tools": [1]}, "tools[0] is 1"),
    (CHAT, {"tools": [{"type": "retrieval"}]}, 'tools[0].type is "retrieval"'),
    (CHAT, {"tools": FUNCTION}, "tools is "),
    (CHAT, {"tool_choice": "required"}, "tool_choice is"),
    (CHAT, {"chat_template_kwargs": 3}, "chat_template_kwargs is 3"),
    (CHAT, {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs sets 'tokenize'"),
    (RESPONSES, {"input": None}, "input is missing"),
    (RESPONSES, {"input": []}, "input is an empty list"),
    (RESPONSES, {"input": 5}, "input is 5"),
    (RESPONSES, {"input": ["x"]}, 'input[0] is "x"'),
    (RESPONSES, {"input": [{"type": "input_image", "image_url": "x"}]}, "the model reads text only"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "input[0] is"),
    (RESPONSES, {"input": [{"role": "user", "content": "x"}, {"type": "computer_call"}]}, "input[1].type is"),
    (RESPONSES, {"instructions": 4}, "instructions is 4"),
    (RESPONSES, {"previous_response_id": "resp_1"}, 'no field "previous_response_id"'),
    # how long
    *[(LEGACY, {"max_tokens": length}, "max_tokens is ") for length in LENGTHS if length != 10**30],
    *[(CHAT, {"max_completion_tokens": length}, "max_completion_tokens is ") for length in LENGTHS if length != 10**30],
    *[(RESPONSES, {"max_output_tokens": length}, "max_output_tokens is ") for length in LENGTHS if length != 10**30],
    (LEGACY, {"max_tokens": 10**30}, f"but the model has {POSITIONS} positions: ask for 503 or fewer"),
    (LEGACY, {"max_tokens": POSITIONS - 8}, "ask for 503 or fewer"),
    (LEGACY, {"max_tokens": POSITIONS, "stream": True}, "ask for 503 or fewer"),
    (LEGACY, {"prompt": "a" * POSITIONS, "max_tokens": 1}, f"the prompt has {POSITIONS} tokens"),
    (LEGACY, {"prompt": "a" * POSITIONS, "max_tokens": None}, "shorten it"),
    (LEGACY, {"prompt": "a" * 100_000}, "shorten it"),
    (CHAT, {"max_completion_tokens": 10**9}, "or fewer"),
    (CHAT, {"messages": [{"role": "user", "content": "b" * 60}] * 9}, "shorten it"),
    (RESPONSES, {"input": "c" * 600}, "shorten it"),
    # how
    *[(LEGACY, {"temperature": value}, "temperature is ") for value in (-1, 2.5, "hot", True, float("nan"), [0])],
    *[(CHAT, {"top_p": value}, "top_p is ") for value in (-0.1, 1.5, "a", float("inf"))],
    *[(RESPONSES, {"seed": value}, "seed is ") for value in ("x", 1.5, 2**64, -(2**70), True)],
    *[(LEGACY, {"n": value}, "n is ") for value in (0, 2, 1.5, "1", True)],
    *[(LEGACY, {"stop": value}, "stop is ") for value in ("", [], [""], ["a", 1], 5, list("abcde"))],
    *[(CHAT, {"stream": value}, "stream is ") for value in ("true", 1, [])],
    (LEGACY, {"frequency_penalty": -2}, "frequency_penalty is -2"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty is 0.5"),
    (LEGACY, {"logprobs": 3}, "logprobs is 3"),
    (CHAT, {"logprobs": True}, "logprobs is true"),
    (LEGACY, {"echo": True}, "echo is true"),
    (LEGACY, {"best_of": 4}, "best_of is 4"),
    (LEGACY, {"suffix": "end"}, 'suffix is "end"'),
    (LEGACY, {"top_k": 5}, 'no field "top_k"'),
    (LEGACY, {"logit_bias": {"x": 1}}, 'logit_bias holds "x"'),
    (CHAT, {"logit_bias": {"100000": 1}}, 'logit_bias holds "100000"'),
    (CHAT, {"logit_bias": {"5": "1"}}, 'logit_bias holds "5"'),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format is"),
    (CHAT, {"reasoning_effort": "high"}, 'no field "reasoning_effort"'),
    (LEGACY, {"generation_config": "{"}, "generation_config is"),
    (LEGACY, {"generation_config": {}}, "generation_config is"),
    (CHAT, {"generation_config": "[]"}, "generation_config is"),
    (CHAT, {"generation_config": '{"num_beams": 4}'}, 'not "num_beams"'),
    (RESPONSES, {"generation_config": '{"max_new_tokens": 0}'}, "for max_new_tokens"),
    # of whom
    (LEGACY, {"model": "gpt-4"}, "model is \"gpt-4\", but this server has 'model' only"),
    (CHAT, {"model": 5}, "model is 5"),
    (RESPONSES, {"model": ["model"]}, 'model is ["model"]'),
]
# Requests of a batch share their sampling.
REFUSED_IN_A_BATCH: list[tuple[str, dict[str, Any], str]] = [
    (LEGACY, {"temperature": 0.7}, "temperature is 0.7, but under --continuous-batching it is 0.0"),
    (CHAT, {"generation_config": '{"do_sample": true}'}, "do_sample is true"),
    (LEGACY, {"stop": "x"}, "stop has no effect under --continuous-batching"),
    (CHAT, {"logit_bias": {"5": 100}}, "logit_bias has no effect under --continuous-batching"),
]
# Bodies that are no request at all.
BROKEN: list[tuple[bytes, str]] = [
    (b"", "the body is not JSON"),
    (b"{", "the body is not JSON"),
    (b'{"prompt": "a"', "the body is not JSON"),
    (b"[]", "the body is [], expected a JSON object"),
    (b'"text"', 'the body is "text"'),
    (b"null", "the body is null"),
    (b'{"prompt": "\xff"}', "the body is not UTF-8: byte 12 is 0xff"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "the body is not JSON"),
    ('{"prompt": "a"}'.encode("utf-16"), "the body is not UTF-8"),
    (b"[" * 100_000, "the body is not JSON"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "the body is not JSON"),
]
