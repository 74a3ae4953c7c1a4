"""The server in this process: how its parts generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import tiny
from bad_requests import CHAT, LEGACY, RIGHT
from server import TEMPLATE, free_port, leave, send
from tiny_text import tiny_tokenizer

from smoothquant_ext import Recipe, disable, quantize, save
from smoothquant_ext.integrations import serving

POSITIONS = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("guarded") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["snowman"])  # the model does not know it
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE}
    network = tiny.build("llama", max_position_embeddings=POSITIONS)
    network.generation_config.eos_token_id = -1
    save(quantize(network, [tiny.token_ids()], Recipe("int8"), progress=False), directory, tokenizer)
    return directory


@pytest.fixture(params=["one by one", "batched"])
def server(request: pytest.FixtureRequest, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Its address and itself."""
    batched = {"continuous_batching": True, "cb_block_size": 32, "cb_num_blocks": 32, "cb_max_batch_tokens": 512}
    port = free_port()
    monkeypatch.chdir(model.parent)
    options: dict[str, Any] = batched if request.param == "batched" else {}
    running = serving._start("model", "127.0.0.1", port, "auto", "cpu", **options)
    try:
        while not running.server.started:
            assert running._thread.is_alive()
        yield f"http://127.0.0.1:{port}", running
    finally:
        serving._stop(running)
        disable()


def test_whole_and_streamed_answers_are_the_same(server: tuple[str, Any]) -> None:
    base, running = server
    whole = send(base, LEGACY, RIGHT[LEGACY])[1]["choices"][0]["text"]
    status, stream = send(base, LEGACY, RIGHT[LEGACY] | {"stream": True})
    assert status == 200
    assert all(f'"text":"{piece}"' in stream or piece in '"\\' for piece in whole)
    assert send(base, CHAT, RIGHT[CHAT])[0] == 200
    for change, words in (
        ({"prompt": "a snowman"}, f"the prompt has token {tiny.VOCAB}, but the model knows {tiny.VOCAB} tokens"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_tokens": POSITIONS}, "or fewer"),
        ({"prompt": "a" * (POSITIONS + 1)}, "shorten it"),
    ):
        for streamed in (True, False):
            status, answer = send(base, LEGACY, RIGHT[LEGACY] | change | {"stream": streamed})
            assert status == 400
            assert words in answer["error"]["message"]
    assert send(base, LEGACY, RIGHT[LEGACY])[1]["choices"][0]["text"] == whole
    assert running.failure() is None


def test_leaving_stopping_and_drawing(server: tuple[str, Any]) -> None:
    base, running = server
    whole = send(base, LEGACY, RIGHT[LEGACY])[1]["choices"][0]["text"]
    for streamed in (True, False):
        leave(base, LEGACY, RIGHT[LEGACY] | {"max_tokens": 1000}, streamed)
        assert send(base, LEGACY, RIGHT[LEGACY])[1]["choices"][0]["text"] == whole
    if running.served.sampling is not None:
        assert running.served.sampling["temperature"] == 0
        return
    for streamed in (True, False):
        status, answer = send(base, LEGACY, RIGHT[LEGACY] | {"stop": whole[3], "stream": streamed})
        assert status == 200
        if not streamed:
            assert answer["choices"][0]["text"] == whole[: whole.index(whole[3])]
    drawn = {
        seed: send(base, LEGACY, RIGHT[LEGACY] | {"temperature": 1.5, "seed": seed})[1]["choices"][0]["text"]
        for seed in (1, 2, 1)
    }
    assert drawn[1] != drawn[2]
    biased = RIGHT[LEGACY] | {"logit_bias": {"40": 100}}
    assert len(set(send(base, LEGACY, biased)[1]["choices"][0]["text"])) == 1


def test_a_thread_that_ends_is_a_failure(server: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base, running = server
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    holder, name = (
        (running.manager._thread, "_thread")
        if running.served.sampling is None
        else (running.manager._cb, "_generation_thread")
    )
    with monkeypatch.context() as patched:
        patched.setattr(holder, name, ended)
        assert "has ended" in running.failure()
        status, answer = send(base, "/health", method="GET")
        assert (status, answer["reason"]) == (503, running.failure())
        assert send(base, LEGACY, RIGHT[LEGACY])[0] == 503
    assert send(base, LEGACY, RIGHT[LEGACY])[0] == 200
