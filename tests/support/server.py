"""A server in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[Any, str, subprocess.Popen[bytes]]]:
    """A client of a server in a process of its own, the model's name, and the process."""
    import openai  # its tests ask first whether it is there

    port = free_port()
    command = [sys.executable, "-c", "from smoothquant_ext.cli import main; main()"]
    process = subprocess.Popen([*command, "serve", model.name, "--port", str(port), *options], cwd=model.parent)
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
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), model.name, process
    finally:
        process.kill()
        process.wait()
