"""The boundary of the server around applications of our own making."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")

from jinja2 import TemplateError

from smoothquant_ext.integrations import generating, guard
from smoothquant_ext.integrations.guard import Guard
from smoothquant_ext.integrations.request_checks import Served

SERVED = Served("model", "{{ messages }}{{ tools }}", frozenset({"tokenize"}), 96)
GOOD = {"model": "model", "prompt": "a"}


class Client:
    """Sends one request to an ASGI application and collects what it answers."""

    def __init__(self, body: Any = GOOD, route: str = "/v1/completions", headers: Any = ()) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        half = len(raw) // 2
        self.coming: list[Any] = [
            {"type": "http.request", "body": raw[:half], "more_body": True},
            {"type": "http.request", "body": raw[half:], "more_body": False},
        ]
        self.scope = {"type": "http", "method": "POST", "path": route, "headers": list(headers)}
        self.left = asyncio.Event()
        self.status, self.text, self.ended = 0, b"", False

    async def receive(self) -> Any:
        if self.coming:
            return self.coming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        assert not self.ended
        if message["type"] == "http.response.start":
            assert self.status == 0
            self.status = message["status"]
        else:
            self.text += message.get("body", b"")
            self.ended = not message.get("more_body", False)

    def error(self) -> str:
        body = json.loads(self.text)["error"]
        assert body.keys() == {"message", "type", "param", "code"}
        return str(body["message"])


async def start(send: Any, status: int = 200, kind: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})


def run(app: Any, client: Callable[[], Client], failure: Callable[[], str | None] = lambda: None) -> Client:
    async def talk() -> Client:
        made = client()
        await asyncio.wait_for(Guard(app, SERVED, failure)(made.scope, made.receive, made.send), 30)
        return made

    return asyncio.run(talk())


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WATCH", 0.01)
    monkeypatch.setattr(guard, "GRACE", 0.01)


async def never(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


def test_what_was_checked_is_what_is_passed_on() -> None:
    """In one piece, said to be JSON, without nulls and without the seed, which is set where it counts."""
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope=scope, message=await receive(), asked=generating.asked.get())
        await start(send)
        await send({"type": "http.response.body", "body": b"yes"})

    headers = [(b"content-type", b"text/plain"), (b"transfer-encoding", b"chunked"), (b"accept", b"any")]
    client = run(app, lambda: Client(GOOD | {"seed": 7, "stop": None, "top_p": 0.5}, headers=headers))
    assert (client.status, client.text) == (200, b"yes")
    assert json.loads(seen["message"]["body"]) == GOOD | {"top_p": 0.5}
    assert seen["asked"] == GOOD | {"seed": 7, "top_p": 0.5}
    length = str(len(seen["message"]["body"])).encode()
    assert sorted(seen["scope"]["headers"]) == [
        (b"accept", b"any"), (b"content-length", length), (b"content-type", b"application/json"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (422, b'{"detail": "no such field"}', (400, "no such field")),
        (422, b'{"detail": [{"loc": ["body"]}]}', (400, '[{"loc": ["body"]}]')),
        (404, b'{"detail": "Not Found"}', (404, "Not Found")),
        (503, b'{"error": "dead"}', (503, "dead")),
        (500, b"Internal Server Error", (500, "Internal Server Error")),
        (502, b"", (502, "the request failed")),
    ],
)
def test_every_error_is_in_the_form_of_openai(status: int, body: bytes, expected: tuple[int, str]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send, status)
        for part in (body[:5], body[5:]):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    client = run(app, Client)
    assert (client.status, client.error()) == expected


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (TemplateError("only\nwizards"), 400, "the chat template of model refuses these messages: only wizards"),
        (ZeroDivisionError("a bug"), 500, "transformers' server failed: a bug"),
        (KeyError(), 500, "transformers' server failed: KeyError"),
    ],
)
def test_an_exception_is_a_sentence(error: Exception, status: int, words: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send, 500, b"text/plain")  # as starlette does before it raises
        await send({"type": "http.response.body", "body": b"Internal Server Error"})
        raise error

    client = run(app, Client)
    assert (client.status, client.error()) == (status, words)


def test_a_sentence_in_a_stream_is_json() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send, kind=b"text/event-stream; charset=utf-8")
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        text = 'data: {"error": "it said "no"\nand left"}\n\n'
        await send({"type": "http.response.body", "body": b"data: {}\n\n" + text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    parts = run(app, Client).text.decode().split("\n\n")
    assert parts[:2] == ["data: {}", "data: {}"]
    assert json.loads(parts[2].removeprefix("data: "))["error"]["message"] == 'it said "no" and left'
    assert parts[3:] == [""]


@pytest.mark.parametrize("started", [False, True])
def test_who_waits_for_a_dead_worker_is_answered(started: bool) -> None:
    reasons = iter([None, None])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await start(send, kind=b"text/event-stream")
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        await never(scope, receive, send)

    client = run(app, Client, lambda: next(reasons, "the worker has died"))
    assert client.ended
    if started:
        assert client.status == 200
        client.text = client.text.removeprefix(b"data: {}\n\ndata: ")
    else:
        assert client.status == 503
    assert client.error() == "the worker has died: restart the server"


def test_who_comes_to_a_dead_worker_is_answered_at_once() -> None:
    client = run(never, Client, lambda: "the worker has died")
    assert (client.status, client.error()) == (503, "the worker has died: restart the server")
    # What is wrong with a request is said all the same.
    assert run(never, lambda: Client({}), lambda: "the worker has died").status == 400


def test_health_tells_the_truth() -> None:
    def asking() -> Client:
        client = Client(b"", "/health")
        client.scope["method"] = "GET"
        return client

    well = run(never, asking)
    assert (well.status, json.loads(well.text)) == (200, {"status": "ok", "running": 0})
    ill = run(never, asking, lambda: "the worker has died")
    assert (ill.status, json.loads(ill.text)) == (503, {"status": "unhealthy", "reason": "the worker has died"})


def test_a_client_that_leaves_ends_its_request() -> None:
    events: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        events.append("begun")
        try:
            await never(scope, receive, send)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise

    async def talk() -> None:
        client, boundary = Client(), Guard(app, SERVED, lambda: None)
        call = asyncio.create_task(boundary(client.scope, client.receive, client.send))
        while not events:
            await asyncio.sleep(0)
        assert len(boundary.running) == 1
        client.left.set()
        await asyncio.wait_for(call, 30)
        assert (events, boundary.running, client.status) == (["begun", "cancelled"], set(), 0)

    asyncio.run(talk())


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error() -> None:
    def leaving() -> Client:
        client = Client()
        client.coming[1] = {"type": "http.disconnect"}
        return client

    assert run(never, leaving).status == 400


def test_two_running_requests_have_two_ids() -> None:
    async def talk() -> None:
        go = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await go.wait()
            await start(send)
            await send({"type": "http.response.body", "body": b"yes"})

        boundary = Guard(app, SERVED, lambda: None)
        clients = [Client(headers=[(b"x-request-id", name)]) for name in (b"1", b"1", b"2")] + [Client(), Client()]
        calls = [asyncio.create_task(boundary(c.scope, c.receive, c.send)) for c in clients]
        await asyncio.wait({calls[1]}, timeout=30)
        assert "x-request-id is '1'" in clients[1].error()
        go.set()
        await asyncio.gather(*calls)
        assert [client.status for client in clients] == [200, 400, 200, 200, 200]
        again = Client(headers=[(b"x-request-id", b"1")])
        await boundary(again.scope, again.receive, again.send)
        assert again.status == 200

    asyncio.run(talk())


def test_a_body_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_BYTES", 100)
    assert run(never, lambda: Client(b"x" * 101)).status == 413


def test_stop_strings_that_come_in_pieces() -> None:
    """The oracle: the whole text up to the first stop string, whatever its pieces."""
    from transformers.cli.serving.utils import ReasoningText

    text = "to be or not to be, that is"

    def cut(pieces: list[Any], stops: list[str]) -> list[Any]:
        async def move() -> list[Any]:
            source: asyncio.Queue[Any] = asyncio.Queue()
            target: asyncio.Queue[Any] = asyncio.Queue()
            for piece in [*pieces, None]:
                source.put_nowait(piece)
            await asyncio.wait_for(generating._cut(source, target, stops), 30)
            return [target.get_nowait() for _ in range(target.qsize())]

        return asyncio.run(move())

    for stops in (["not"], ["t t", "r n"], ["be,"], ["zz", "be, that is not"], ["o"], ["is"], ["t", "to"]):
        end = generating.first_of(stops, text)
        for size in (1, 2, 3, 5, 100):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            *parts, last = cut(pieces, stops)
            assert ("".join(parts), last) == (text[:end], None), (stops, size)
            assert "" not in parts
    thought = cut([ReasoningText("hm n"), "ot yet", ReasoningText("x")], ["not"])
    assert [(type(part), part) for part in thought[:-1]] == [
        (ReasoningText, "hm "), (ReasoningText, "n"), (str, "ot yet"), (ReasoningText, "x"),
    ]  # fmt: skip
