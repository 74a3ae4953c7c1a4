"""The server with requests as clients send them in the wild: each gets the right answer or a sentence, and the next
request its right answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from bad_requests import BROKEN, CHAT, LEGACY, POSITIONS, REFUSED, REFUSED_IN_A_BATCH, RESPONSES, RIGHT
from server import TEMPLATE, leave, send, served
from tiny_text import tiny_tokenizer

from smoothquant_ext import Recipe, quantize, save

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

STRICT = (
    "{% for m in messages if m['role'] == 'wizard' %}{{ raise_exception('no wizard here') }}{% endfor %}" + TEMPLATE
)
CACHE = 1024
WAYS: dict[str, tuple[str, ...]] = {
    "one by one": (),
    "batched": ("--continuous-batching", "--cache-tokens", str(CACHE)),
}


def write_model(directory: Path, template: str | None = STRICT, positions: int = POSITIONS) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    network = tiny.build("llama", max_position_embeddings=positions)
    network.generation_config.eos_token_id = -1  # so that every answer is as long as allowed
    save(quantize(network, [tiny.token_ids()], Recipe("int8"), progress=False), directory, tokenizer)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("inputs") / "model")


@pytest.fixture(scope="module", params=list(WAYS))
def server(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[str, str]]:
    """The address of a server, and how it serves."""
    with served(model, *WAYS[request.param]) as (client, _, _):
        yield str(client.base_url).removesuffix("/v1/"), request.param


def text_of(route: str, answer: Any) -> str:
    if route == RESPONSES:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["text"] if route == LEGACY else choice["message"]["content"])


def right_answers(base: str) -> dict[str, str]:
    answers = {route: send(base, route, body) for route, body in RIGHT.items()}
    assert [status for status, _ in answers.values()] == [200] * 3, answers
    return {route: text_of(route, answer) for route, (_, answer) in answers.items()}


def complaint_of(status: int, answer: Any) -> str:
    """The one sentence of a refusal in OpenAI's form."""
    assert status == 400, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    return str(answer["error"]["message"])


def test_a_bad_request_gets_a_sentence_and_the_next_one_its_answer(server: tuple[str, str]) -> None:
    base, way = server
    before = right_answers(base)
    assert all(len(text) == 6 for text in before.values())
    refused = REFUSED + (REFUSED_IN_A_BATCH if way == "batched" else [])
    for route, change, words in refused:
        said = complaint_of(*send(base, route, RIGHT[route] | change))
        assert words in said, (route, change, said)
        assert "\n" not in said
        status, answer = send(base, LEGACY, RIGHT[LEGACY])
        assert (status, text_of(LEGACY, answer)) == (200, before[LEGACY]), (route, change)
    for route in RIGHT:
        for raw, words in BROKEN:
            assert words in complaint_of(*send(base, route, raw=raw)), raw[:40]
    assert right_answers(base) == before
    assert send(base, "/health", method="GET") == (200, {"status": "ok", "running": 0})


def test_what_asks_for_nothing_is_no_reason_to_refuse(server: tuple[str, str]) -> None:
    base, _ = server
    before = right_answers(base)
    idle = dict.fromkeys(("stop", "seed", "top_p", "logit_bias", "n", "generation_config", "user"))
    neutral = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "logit_bias": {}, "seed": 5}
    for change in (idle, neutral, {"model": None}, {"stream_options": {"include_usage": True}}, {"user": "me"}):
        for route in (LEGACY, CHAT):
            status, answer = send(base, route, RIGHT[route] | change)
            assert (status, text_of(route, answer)) == (200, before[route]), change
    for change in ({"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"}, {"modalities": ["text"]}):
        assert text_of(CHAT, send(base, CHAT, RIGHT[CHAT] | change)[1]) == before[CHAT]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert text_of(CHAT, send(base, CHAT, RIGHT[CHAT] | {"messages": parts})[1]) == before[CHAT]
    for given in (parts, [{"type": "input_text", "text": "hello"}]):
        assert text_of(RESPONSES, send(base, RESPONSES, RIGHT[RESPONSES] | {"input": given})[1]) == before[RESPONSES]
    # Without a stream asked for there is none, and clients need not say that their body is JSON.
    assert send(base, LEGACY, RIGHT[LEGACY], headers={"Content-Type": "text/plain"})[0] == 200


def test_an_answer_may_fill_the_model_to_its_last_position(server: tuple[str, str]) -> None:
    base, _ = server
    prompt = "once upon a time "
    for change, expected in (
        ({"prompt": prompt, "max_tokens": POSITIONS - len(prompt)}, POSITIONS - len(prompt)),
        ({"prompt": "a" * (POSITIONS - 1), "max_tokens": 1}, 1),
        ({"prompt": "a" * (POSITIONS - 3), "max_tokens": None}, 3),
    ):
        status, answer = send(base, LEGACY, RIGHT[LEGACY] | change)
        assert (status, answer["usage"]["completion_tokens"]) == (200, expected)
        assert answer["choices"][0]["finish_reason"] == "length"


def test_routes_and_methods_that_are_not_there(server: tuple[str, str]) -> None:
    base, _ = server
    for route in ("/v1/embeddings", "/v1/systemone", "/v1/audio/transcriptions", "/reset", "/", "/v1/completions/"):
        status, answer = send(base, route, {"model": "model"})
        assert (status, answer["error"]["type"]) == (404, "invalid_request_error"), route
        assert f"{route} is not served here" in answer["error"]["message"]
    assert send(base, "/nothing", method="GET")[0] == 404
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        status, answer = send(base, LEGACY, method=method)
        assert (status, answer["error"]["message"]) == (405, "Method Not Allowed"), method
    assert "'model' only" in complaint_of(*send(base, "/load_model", {"model": "gpt2"}))
    assert send(base, "/load_model", {"model": "model"})[0] == 200
    status, models = send(base, "/v1/models", method="GET")
    assert (status, [each["id"] for each in models["data"]]) == (200, ["model"])
    assert len(text_of(LEGACY, send(base, LEGACY, RIGHT[LEGACY])[1])) == 6


def test_two_requests_at_once_do_not_disturb_each_other(server: tuple[str, str]) -> None:
    """Two that together need more than the cache has, beside bad ones, and two with the same id."""
    base, way = server
    long = RIGHT[LEGACY] | {"max_tokens": 500}
    alone = [text_of(LEGACY, send(base, LEGACY, long | {"prompt": prompt})[1]) for prompt in ("ab", "cd", "ef")]
    got: dict[str, tuple[int, Any]] = {}

    def ask(name: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        got[name] = send(base, LEGACY, body, headers=headers)

    threads = [threading.Thread(target=ask, args=(p, long | {"prompt": p}, {})) for p in ("ab", "cd", "ef")]
    threads += [threading.Thread(target=ask, args=(f"bad {i}", {"prompt": ""}, {})) for i in range(3)]
    threads += [threading.Thread(target=ask, args=(f"id {i}", long, {"x-request-id": "7"})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [text_of(LEGACY, got[prompt][1]) for prompt in ("ab", "cd", "ef")]
    assert [got[prompt][1]["usage"]["completion_tokens"] for prompt in ("ab", "cd", "ef")] == [500] * 3
    # The attention of a batch rounds by what is in it, and one other token changes all that follow.
    sure = 6 if way == "batched" else 500
    assert [text[:sure] for text in texts] == [text[:sure] for text in alone]
    assert [got[f"bad {i}"][0] for i in range(3)] == [400] * 3
    same = [got[f"id {i}"] for i in range(2)]
    assert 200 in {status for status, _ in same}
    assert all(status == 200 or "x-request-id is '7'" in answer["error"]["message"] for status, answer in same)


def test_stop_strings_end_an_answer_and_are_not_in_it(server: tuple[str, str]) -> None:
    base, way = server
    if way == "batched":
        return  # refused, see REFUSED_IN_A_BATCH
    for route, length in ((LEGACY, "max_tokens"), (CHAT, "max_completion_tokens")):
        body = {name: value for name, value in RIGHT[route].items() if name != "max_tokens"} | {length: 60}
        whole = text_of(route, send(base, route, body)[1])
        assert len(whole) == 60
        for stop in (whole[7], [whole[20:23], whole[5:8]], ["\u2603", whole[30:32]], "never there"):
            stops = stop if isinstance(stop, list) else [stop]
            ends = [whole.find(each) for each in stops if each in whole]
            expected = whole[: min(ends, default=len(whole))]
            status, answer = send(base, route, body | {"stop": stop})
            assert (status, text_of(route, answer)) == (200, expected), stop
            assert answer["choices"][0]["finish_reason"] == ("stop" if ends else "length")
            status, stream = send(base, route, body | {"stop": stop, "stream": True})
            parts = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
            pieces = [p["choices"][0].get("text") or p["choices"][0].get("delta", {}).get("content") for p in parts]
            assert "".join(piece for piece in pieces if piece) == expected, stop


def test_seeds_and_biases_change_their_own_answer_only(server: tuple[str, str]) -> None:
    base, way = server
    if way == "batched":
        return  # refused, see REFUSED_IN_A_BATCH
    random = RIGHT[LEGACY] | {"temperature": 1.5, "max_tokens": 40}
    ask = [text_of(LEGACY, send(base, LEGACY, random | {"seed": seed})[1]) for seed in (1, 2, 1)]
    assert ask[0] == ask[2] != ask[1]
    together: dict[int, str] = {}

    def draw(number: int) -> None:
        together[number] = text_of(LEGACY, send(base, LEGACY, random | {"seed": 1 + number % 2})[1])

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(6)] == ask[:2] * 3
    token = tiny_tokenizer().convert_tokens_to_ids("Q")
    for route in (LEGACY, CHAT):
        answer = send(base, route, RIGHT[route] | {"logit_bias": {str(token): 100}})[1]
        assert text_of(route, answer) == "QQQQQQ"


def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    """The answers that nobody waits for would take a quarter of an hour each. The model has no chat template."""
    large = write_model(tmp_path / "model", template=None, positions=1_000_000)
    endless = RIGHT[LEGACY] | {"max_tokens": 900_000}
    with served(large) as (client, name, _):
        base = str(client.base_url).removesuffix("/v1/")
        before = send(base, LEGACY, RIGHT[LEGACY])[1]["choices"]
        for streamed in (True, False, True):
            leave(base, LEGACY, endless, streamed)
            assert send(base, LEGACY, RIGHT[LEGACY])[1]["choices"] == before
        for route in (CHAT, RESPONSES):
            said = complaint_of(*send(base, route, RIGHT[route]))
            assert said == f"model has no chat template, so it cannot answer {route}: send a prompt to /v1/completions"
        with pytest.raises(openai.BadRequestError, match="has no chat template"):
            client.chat.completions.create(model=name, messages=[{"role": "user", "content": "x"}])
        assert send(base, LEGACY, RIGHT[LEGACY])[1]["choices"] == before
        assert send(base, "/health", method="GET") == (200, {"status": "ok", "running": 0})


CANCELLED = """
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager as Manager
cancel = Manager.cancel_request
def noted(self, request_id):
    with open("cancelled", "a") as file:
        file.write(request_id + "\\n")
    cancel(self, request_id)
Manager.cancel_request = noted
"""


def test_a_client_that_leaves_a_batch_is_taken_out_of_it(tmp_path: Path) -> None:
    large = write_model(tmp_path / "model", positions=1_000_000)
    endless = RIGHT[LEGACY] | {"max_tokens": 4000}
    noted = tmp_path / "cancelled"
    with served(large, "--continuous-batching", "--cache-tokens", "4096", before=CANCELLED) as (client, _, process):
        base = str(client.base_url).removesuffix("/v1/")
        before = right_answers(base)
        for count, streamed in enumerate((True, False), start=1):
            leave(base, LEGACY, endless, streamed)
            while not noted.exists() or len(noted.read_text().split()) < count:
                assert process.poll() is None
            assert right_answers(base) == before
        # Here the cache is the limit, not the model.
        for change in ({"prompt": "a" * 5000}, {"max_tokens": 4096}, {"prompt": "a" * 4096, "max_tokens": 1}):
            said = complaint_of(*send(base, LEGACY, RIGHT[LEGACY] | change))
            assert "the cache holds 4096 tokens (--cache-tokens)" in said
        status, answer = send(base, LEGACY, RIGHT[LEGACY] | {"prompt": "a" * 4000, "max_tokens": 96})
        assert (status, answer["usage"]["total_tokens"]) == (200, 4096)


DYING = """
from pathlib import Path
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor as Processor
step = Processor._generation_step
def dying(self, model):
    if Path("die").exists():
        raise RuntimeError("out of luck")
    step(self, model)
Processor._generation_step = dying
"""


def test_a_dead_worker_ends_the_server_and_leaves_nobody_waiting(tmp_path: Path) -> None:
    large = write_model(tmp_path / "model", positions=1_000_000)
    endless = RIGHT[LEGACY] | {"max_tokens": 5_000, "temperature": 0.5}
    log = tmp_path / "log"
    options = ("--continuous-batching", "--cache-tokens", "20000", "--temperature", "0.5")
    with served(large, *options, before=DYING, log=log) as (client, name, process):
        base = str(client.base_url).removesuffix("/v1/")
        for asked in (0, 1.0):
            said = complaint_of(*send(base, LEGACY, endless | {"temperature": asked}))
            assert "it is 0.5 for all requests: leave it out, or serve with another --temperature" in said
        got: list[tuple[int, Any]] = []
        waiting = [threading.Thread(target=lambda: got.append(send(base, LEGACY, endless))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        stream = client.completions.create(model=name, prompt="once", max_tokens=5_000, temperature=0.5, stream=True)
        next(iter(stream))
        while send(base, "/health", method="GET")[1]["running"] < 3:
            assert process.poll() is None
        (tmp_path / "die").touch()
        with pytest.raises(openai.APIError, match="out of luck"):
            list(stream)
        for thread in waiting:
            thread.join()
        assert [status for status, _ in got] == [503, 503]
        assert all("out of luck" in answer["error"]["message"] for _, answer in got)
        assert process.wait(30) == 2
    last = log.read_text().splitlines()[-1]
    assert "error: the server on 127.0.0.1:" in last
    assert "ended, because the worker of continuous batching has died (out of luck): start it again" in last
