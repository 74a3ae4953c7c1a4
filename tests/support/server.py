"""A server in a process of its own, and requests that the official client would not send."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
PATIENCE = 60  # seconds for an answer: far more than any needs


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(
    model: Path, *options: str, before: str = "", log: Path | None = None
) -> Iterator[tuple[Any, str, subprocess.Popen[bytes]]]:
    """A client of a server in a process of its own, the model's name, and the process.

    ``before`` is Python code that the process runs first; ``log`` is a file for what it says.
    """
    import openai  # its tests ask first whether it is there

    port = free_port()
    code = f"{before}\nfrom smoothquant_ext.cli import main; main()"
    said = None if log is None else log.open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", model.name, "--port", str(port), *options],
        cwd=model.parent,
        stdout=said,
        stderr=said,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    assert answer.status == 200
                    break
            except urllib.error.URLError:
                assert process.poll() is None, "the server ended before it began"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        base = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=PATIENCE)
        yield client, model.name, process
    finally:
        process.kill()
        process.wait()
        if said is not None:
            said.close()


def send(
    base: str,
    route: str,
    body: Any = None,
    *,
    raw: bytes | None = None,
    method: str = "POST",
    headers: Mapping[str, str] = {},
) -> tuple[int, Any]:
    """The status of an answer and its body, which is text where it is no JSON."""
    data = raw if raw is not None or body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{base}{route}", data=data, method=method, headers={"Content-Type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode()


def leave(base: str, route: str, body: Any, streamed: bool) -> None:
    """Sends a request and closes the connection: at the first part of a stream, otherwise at once."""
    host, port = base.removeprefix("http://").split(":")
    raw = json.dumps({**body, "stream": streamed}).encode()
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        if streamed:
            assert connection.recv(4096)
