"""The server, as the official client of OpenAI sees it, and its end."""

from __future__ import annotations

import signal
import socket
import threading
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from server import TEMPLATE, free_port, served
from tiny_text import tiny_tokenizer

from smoothquant_ext import Recipe, quantize, save
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.integrations import serving

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
MESSAGES: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serving") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    network = tiny.build("llama", max_position_embeddings=2048)
    network.generation_config.eos_token_id = -1  # so that every answer is as long as allowed
    save(quantize(network, [tiny.token_ids()], Recipe("int8"), progress=False), directory, tokenizer)
    return directory


@pytest.mark.parametrize("options", [(), ("--continuous-batching", "--cache-tokens", "2048")], ids=["plain", "batched"])
def test_the_official_client(options: tuple[str, ...], model: Path) -> None:
    with served(model, *options) as (client, name, process):
        assert [each.id for each in client.models.list()] == [name]
        greedy: Any = {"model": name, "temperature": 0}
        answer = client.completions.create(prompt="once upon", max_tokens=8, **greedy)
        assert len(answer.choices[0].text) > 0
        said = client.chat.completions.create(messages=MESSAGES, max_tokens=8, **greedy).choices[0].message.content
        stream = client.chat.completions.create(messages=MESSAGES, max_tokens=8, stream=True, **greedy)
        parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
        assert "".join(parts) == said
        assert len(parts) > 1

        # Many at once get what each would get alone.
        prompts = ["a", "bcd", "efghi jk", "lm"]
        alone = [client.completions.create(prompt=prompt, max_tokens=6, **greedy).choices[0].text for prompt in prompts]
        together: dict[str, str] = {}

        def ask(prompt: str) -> None:
            together[prompt] = client.completions.create(prompt=prompt, max_tokens=6, **greedy).choices[0].text

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[prompt] for prompt in prompts] == alone

        # A client that goes away in the middle does not block the next one.
        stream = client.chat.completions.create(messages=MESSAGES, max_tokens=1500, stream=True, **greedy)
        next(iter(stream))
        stream.close()
        assert (
            client.completions.create(prompt="once upon", max_tokens=8, **greedy).choices[0].text
            == answer.choices[0].text
        )
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="another", prompt="x", max_tokens=1)

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_what_was_asked_before_the_signal_is_answered(model: Path) -> None:
    with served(model) as (client, name, process):
        stream = client.completions.create(model=name, prompt="a", max_tokens=300, temperature=0, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = [part for part in stream if part.choices]
        assert first.choices
        assert rest[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0


@pytest.mark.slow
def test_memory_is_flat_over_500_requests(model: Path) -> None:
    with served(model) as (client, name, process):
        own = psutil.Process(process.pid)

        def ask(count: int) -> int:
            for number in range(count):
                client.completions.create(model=name, prompt=f"{number} is", max_tokens=8)
            return int(own.memory_info().rss)

        before = ask(100)
        assert ask(500) - before < 8e6  # 16 KB a request: less than its smallest cache


def test_what_cannot_be_served_is_said_first(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SmoothQuantError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another --port"):
            serving.serve(str(model), "127.0.0.1", port)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SmoothQuantError, match=r"empty/config\.json does not exist"):
        serving.serve(str(tmp_path / "empty"), "127.0.0.1", free_port())
    find = serving.importlib.util.find_spec
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(SmoothQuantError, match=r"needs the package fastapi; run pip install 'smoothquant-ext"):
        serving.chat(str(model))


def test_a_server_that_ends_by_itself_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Thread(target=lambda: None)
    stopped.start()
    monkeypatch.setattr(
        serving, "_start", lambda *_, **__: types.SimpleNamespace(_thread=stopped, failure=lambda: None)
    )
    with pytest.raises(SmoothQuantError, match="ended by itself"):
        serving.serve(str(model), "127.0.0.1", free_port())


def test_options_reach_the_server(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Server:
        def __init__(self, **options: Any) -> None:
            given.append(options)
            raise ValueError("enough")

    monkeypatch.setattr("smoothquant_ext.integrations.guarded_server.GuardedServer", Server)
    for options in ({"compiled": True}, {"batching": serving.Batching(64, 0.5)}, {}):
        with pytest.raises(SmoothQuantError, match="enough"):
            serving.serve(str(model), "127.0.0.1", free_port(), device="cuda:0", **options)
    assert [options["device"] for options in given] == ["cuda:0"] * 3
    assert [options.get("compile", False) for options in given] == [True, False, False]
    assert [options.get("cb_num_blocks") for options in given] == [None, 2, None]
    assert [options.get("temperature") for options in given] == [None, 0.5, None]


def test_modelopts_own_file_is_not_overlooked(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(SmoothQuantError, match="run 'smoothquant convert' on it first"):
        serving.serve(str(tmp_path / "model"), "127.0.0.1", free_port())


def test_a_talk(model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers' chat, with somebody at the keyboard."""
    from transformers.cli import chat

    answers: list[str] = []
    lines = iter(["hello", "!exit"])
    output = chat.RichInterface.stream_output

    async def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = await output(self, *args, **kwargs)
        answers.append(result[0] if isinstance(result, tuple) else result)
        return result

    monkeypatch.setattr(chat.RichInterface, "input", lambda self: next(lines))
    monkeypatch.setattr(chat.RichInterface, "stream_output", listen)
    monkeypatch.setattr(chat.RichInterface, "confirm", lambda *_, **__: False)  # whether to go on past the limit
    serving.chat(str(model), max_new_tokens=6)
    assert len(answers) == 1
    assert answers[0]
    assert "INFO" not in capfd.readouterr().err
