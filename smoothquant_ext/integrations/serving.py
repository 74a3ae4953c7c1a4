"""transformers' OpenAI-compatible server and its chat, on 8-bit kernels."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.reading import CONFIG, find_quantization
from ..compat import first_line
from ..errors import SmoothQuantError
from .from_pretrained import enable

CACHE_TOKENS = 16384  # tokens in the cache, by default
BLOCK = 32  # tokens in a block of the cache
STEP_TOKENS = 512  # tokens of all requests in one step of a continuous batch
LAST_ANSWERS = 1  # seconds in which requests get an error after the worker died
LAST_STREAMS = 5  # seconds in which clients may read the end of it
PACKAGES = ("accelerate", "fastapi", "openai", "uvicorn")


@dataclass(frozen=True)
class Batching:
    """Continuous batching.

    Args:
        cache_tokens: tokens in the cache of all requests together.
        temperature: of all answers; ``None`` is the model's own.
    """

    cache_tokens: int = CACHE_TOKENS
    temperature: float | None = None


def serve(
    model: str,
    host: str,
    port: int,
    dtype: str = "auto",
    device: str = "cpu",
    batching: Batching | None = None,
    compiled: bool = False,
) -> None:
    """Serves a model until SIGINT or SIGTERM, then finishes the running requests and returns.

    Args:
        model: a directory or a hub id, quantized or not; clients use it as the model's name.
        host: address to listen on.
        port: port to listen on.
        dtype: dtype of the parts in floating point; ``"auto"`` is the checkpoint's.
        device: a torch device.
        batching: of requests; ``None`` answers them one by one.
        compiled: whether to answer from a static cache, which on a GPU also compiles; see ``use_static_cache_``.

    Raises:
        SmoothQuantError: a package is missing, the port is taken, the model cannot be loaded, or the worker died.
    """
    _check_packages()
    _check_port(host, port)
    options: dict[str, Any] = {"compile": True} if compiled else {}
    if batching is not None:
        options |= {
            "continuous_batching": True,
            "cb_block_size": BLOCK,
            "cb_num_blocks": -(-batching.cache_tokens // BLOCK),
            "cb_max_batch_tokens": STEP_TOKENS,
            "temperature": batching.temperature,
        }
    server = _start(model, host, port, dtype, device, **options)
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stopped.wait(0.2) and server._thread.is_alive() and not server.failure():
            pass
    finally:  # a second signal ends the process at once
        for number, handler in before.items():
            signal.signal(number, handler)
    failure = server.failure()
    if failure:
        stopped.wait(LAST_ANSWERS)  # long enough for clients on their way, and for those who watch /health
    elif not stopped.is_set():
        raise SmoothQuantError(f"the server on {host}:{port} ended by itself; its last messages are above")
    _stop(server, LAST_STREAMS if failure else None)
    if failure:
        raise SmoothQuantError(f"the server on {host}:{port} ended, because {failure}: start it again")


def chat(
    model: str,
    dtype: str = "auto",
    device: str = "cpu",
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
) -> None:
    """Starts a chat with a model in the terminal, through a local server that ends with the chat.

    Raises:
        SmoothQuantError: a package is missing, the model cannot be loaded or has no chat template, or it cannot go on,
            as when the conversation is longer than the model.
    """
    _check_packages()
    if sys.stdin is None:
        raise SmoothQuantError("a chat needs a keyboard or a file to read from, but its input is closed")
    from transformers.cli.chat import Chat

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error"):  # their messages would appear in the chat
        logging.getLogger(name).addFilter(lambda entry: entry.levelno >= logging.WARNING)
    server = _start(model, "127.0.0.1", port, dtype, device, log_level="error")
    flags = [f"max_new_tokens={max_new_tokens}", f"do_sample={temperature > 0}"]
    flags += [f"temperature={temperature:.6f}"] if temperature else []
    try:
        if server.served.template is None:
            raise SmoothQuantError(
                f"{model} has no chat template, so it is not a chat model: use 'smoothquant generate'"
            )
        Chat(model, f"http://127.0.0.1:{port}", flags, system_prompt=system, save_folder=tempfile.gettempdir())
    except EOFError:  # nobody is at the keyboard any more
        pass
    except SmoothQuantError:
        raise
    except Exception as error:  # transformers' chat lets errors of the server and of its own commands through
        raise SmoothQuantError(f"the chat has ended: {_reason(error)}") from error
    finally:
        _stop(server)


def _start(model: str, host: str, port: int, dtype: str, device: str, **options: Any) -> Any:
    """Starts transformers' server in a thread, with the model loaded. The main thread keeps the signals."""
    try:
        from .guarded_server import GuardedServer
    except ImportError as error:
        raise SmoothQuantError(
            f"this transformers has another server than the one of 5.24 ({first_line(error)}): upgrade transformers"
        ) from error
    if Path(model).is_dir() and (found := find_quantization(Path(model))) and found[1].name != CONFIG:
        raise SmoothQuantError(
            f"{model} describes its quantization only in {found[1].name}, which transformers does not read; run "
            f"'smoothquant convert' on it first"
        )
    enable()
    try:
        return GuardedServer(
            force_model=model, host=host, port=port, device=device, dtype=dtype, non_blocking=True, **options
        )
    except SmoothQuantError:
        raise
    except Exception as error:  # transformers raises many types for a model that it cannot load
        raise SmoothQuantError(f"{model}: transformers cannot serve this model ({first_line(error)})") from error


def _stop(server: Any, patience: int | None = None) -> None:
    """Finishes the running requests, for at most so many seconds, then ends the server and its threads."""
    server.server.config.timeout_graceful_shutdown = patience
    server.server.should_exit = True
    server._thread.join()
    server.kill_server()


def _reason(error: Exception) -> str:
    """The server's sentence in an error of its client; else the error's own."""
    found = re.search(r"\{'message'.*\}", str(error))  # it shows the server's object as Python does
    return str(ast.literal_eval(found[0])["message"]) if found else first_line(error)


def _check_packages() -> None:
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise SmoothQuantError(f"serving needs the package {package}; run pip install 'smoothquant-ext[serve]'")


def _check_port(host: str, port: int) -> None:
    """Raises before the model is loaded, which takes longer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SmoothQuantError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host") from error
