"""The boundary of the server: every request passes here before transformers' server sees it, and every answer after.

A request that cannot be answered gets an error in OpenAI's form, with a sentence. A client that leaves ends its
request. When the worker dies, the requests that wait are answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jinja2 import TemplateError

from .generating import OURS, asked
from .request_checks import BODY_BYTES, ROUTES, Refusal, Served, check, parse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WATCH = 0.25  # seconds between two looks at the worker
GRACE = 1.0  # seconds that transformers' server has to answer by itself after its worker died
REQUEST_ID = b"x-request-id"
JSON_TYPE = (b"content-type", b"application/json")

logger = logging.getLogger(__name__)


class Guard:
    """An ASGI application around transformers' server.

    Args:
        app: that server.
        served: what requests may ask.
        failure: why the worker answers no more, or ``None``.
    """

    def __init__(self, app: Any, served: Served, failure: Callable[[], str | None]) -> None:
        self.app, self.served, self.failure = app, served, failure
        self.running: set[str] = set()  # ids of requests, and one for each request without

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        try:
            if scope["path"] == "/health" and scope["method"] == "GET":
                await self._tell_health(answer)
            else:
                await self._pass_on(scope, receive, answer)
        except Refusal as refusal:
            await answer.refuse(refusal)

    async def _tell_health(self, answer: Answer) -> None:
        if reason := self.failure():
            await answer.send_json(503, {"status": "unhealthy", "reason": reason})
        else:
            await answer.send_json(200, {"status": "ok", "running": len(self.running)})

    async def _pass_on(self, scope: Message, receive: Receive, answer: Answer) -> None:
        """Checks a request, has it answered, and watches its client and the worker meanwhile."""
        raw = b""
        if scope["method"] == "POST":
            route = scope["path"]
            if route not in ROUTES:
                raise Refusal(f"{route} is not served here; these are: {', '.join(ROUTES)}", status=404)
            body = check(route, parse(await _read(receive)), self.served)
            asked.set(body)
            raw = json.dumps({field: value for field, value in body.items() if field not in OURS}).encode()
            scope = {**scope, "headers": _headers(scope["headers"], len(raw))}
        if reason := self.failure():
            raise Refusal(f"{reason}: restart the server", status=503)
        name = self._name(scope)
        gone = asyncio.Event()
        watch = asyncio.create_task(_watch(receive, gone))
        call = asyncio.create_task(self.app(scope, _replay(raw, gone), answer.send))
        self.running.add(name)
        try:
            await self._wait(call, gone, answer)
        finally:
            self.running.discard(name)
            watch.cancel()
        await answer.finish()

    def _name(self, scope: Message) -> str:
        """The request's id. transformers tells the requests of a batch apart by the id that the client gives."""
        given = dict(scope["headers"]).get(REQUEST_ID, b"").decode("latin-1")
        if given in self.running:
            raise Refusal(f"x-request-id is {given!r}, which is the id of a request that still runs", "x-request-id")
        return given or f"unnamed {id(scope)}"

    async def _wait(self, call: asyncio.Task[None], gone: asyncio.Event, answer: Answer) -> None:
        left = asyncio.create_task(gone.wait())
        try:
            while not call.done():
                await asyncio.wait({call, left}, timeout=WATCH, return_when=asyncio.FIRST_COMPLETED)
                if call.done():
                    break
                reason = self.failure()
                if reason is not None:
                    await asyncio.wait({call}, timeout=GRACE)
                if left.done() or reason is not None:
                    call.cancel()
                    await asyncio.wait({call})
                    if reason is not None:
                        await answer.refuse(Refusal(f"{reason}: restart the server", status=503))
                    return
            call.result()
        except TemplateError as error:
            sentence = f"the chat template of {self.served.model} refuses these messages: {_one_line(error)}"
            await answer.refuse(Refusal(sentence, "messages"))
        except Exception as error:  # transformers' server raises what it did not expect after its answer, a 500
            await asyncio.sleep(WATCH)  # a worker that dies first fails its requests and then says that it is dead
            if reason := self.failure():
                await answer.refuse(Refusal(f"{reason}: restart the server", status=503))
                return
            logger.exception("a request failed")
            await answer.refuse(Refusal(f"transformers' server failed: {_one_line(error)}", status=500))
        finally:
            left.cancel()
            if not call.done():  # this request's own task is cancelled: the server ends
                call.cancel()


class Answer:
    """An answer on its way to the client. An error is held back until it is whole, then sent in OpenAI's form."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = self._ended = self._streams = False
        self._error: tuple[int, list[tuple[bytes, bytes]]] | None = None
        self._text = b""

    async def send(self, message: Message) -> None:
        """What transformers' server sends."""
        if message["type"] == "http.response.start" and message["status"] >= 400:
            self._error = message["status"], message.get("headers", [])
        elif self._error is not None:
            self._text += message.get("body", b"")
        else:
            if message["type"] == "http.response.start":
                self._started = True
                self._streams = any(b"event-stream" in value for _, value in message.get("headers", []))
            elif message["type"] == "http.response.body":
                self._ended = not message.get("more_body", False)
                if self._streams:
                    message = {**message, "body": _reshaped(message.get("body", b""))}
            await self._send(message)

    async def finish(self) -> None:
        """Sends an error that was held back."""
        if self._error is not None and not self._started:
            status, headers = self._error
            refusal = Refusal(_sentence(self._text), status=400 if status == 422 else status)
            allow = [pair for pair in headers if pair[0] == b"allow"]
            await self.send_json(refusal.status, refusal.body(), allow)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with an error, inside of a stream where one has begun."""
        if not self._started:
            await self.send_json(refusal.status, refusal.body())
        elif not self._ended:
            last = f"data: {json.dumps(refusal.body())}\n\n".encode() if self._streams else b""
            self._ended = True
            await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def send_json(self, status: int, body: Any, headers: Any = ()) -> None:
        """Answers with an object."""
        self._started = self._ended = True
        raw = json.dumps(body).encode()
        headers = [JSON_TYPE, (b"content-length", str(len(raw)).encode()), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": raw})


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal("the client left before its request was whole")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            raise Refusal(f"the body has more than {BODY_BYTES >> 20} MiB", status=413)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(raw: bytes, gone: asyncio.Event) -> Receive:
    messages = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _watch(receive: Receive, gone: asyncio.Event) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


def _headers(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    """The headers of a request with another body: clients may leave out that it is JSON."""
    changed = (b"content-type", b"content-length", b"transfer-encoding")
    kept = [pair for pair in headers if pair[0] not in changed]
    return [*kept, JSON_TYPE, (b"content-length", str(length).encode())]


def _sentence(raw: bytes) -> str:
    """The sentence in an error of transformers' server or of FastAPI."""
    try:
        body = json.loads(raw)
    except ValueError:
        return raw.decode("utf-8", "replace") or "the request failed"
    found = body.get("detail", body.get("error", body)) if isinstance(body, dict) else body
    return found if isinstance(found, str) else json.dumps(found)


def _reshaped(part: bytes) -> bytes:
    """A part of a stream, an error in it in OpenAI's form: transformers writes its sentence without any escapes."""
    before, mark, error = part.partition(b'data: {"error": "')
    if not mark:
        return part
    refusal = Refusal(" ".join(error.decode().removesuffix('"}\n\n').split()), status=500)
    return before + f"data: {json.dumps(refusal.body())}\n\n".encode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
