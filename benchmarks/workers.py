"""Worker processes: each engine runs in a separate process with its thread pool, and one process runs at a time.

Thread pools that share two cores take them from each other, even idle ones: most spin for a while, some for ever.
Therefore a worker's process and its children are stopped (SIGSTOP) until their turn. Each may spin in its turn.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS_TO_END = 20
# Engines talk while they load; what matters reaches the parent as an exception.
QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class WorkerError(Exception):
    """Raised when a worker fails; the message is the reason."""


class Unavailable(Exception):
    """Raised in a worker when a method cannot run on this machine."""


def first_cpus(threads: int) -> list[int]:
    """The first CPUs that this process may use, one for each thread."""
    cpus = sorted(os.sched_getaffinity(0))
    if threads > len(cpus):
        raise WorkerError(f"{threads} threads on {len(cpus)} CPUs would wait for each other: ask for fewer")
    return cpus[:threads]


class Worker(AbstractContextManager["Worker"]):
    """An object in a separate process on the first CPUs, whose methods are called from here, one at a time."""

    def __init__(
        self, factory: Callable[..., object], *arguments: object, threads: int, environment: Mapping[str, str] = {}
    ) -> None:
        """Starts the process with these variables and waits until ``factory(*arguments)`` is done there."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        cpus = first_cpus(threads)
        self._process = context.Process(target=_serve, args=(theirs, cpus, factory, arguments))
        with _variables({**QUIET, "OMP_NUM_THREADS": str(threads), **environment}):
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: object) -> Any:
        """Lets the worker run and returns the result of its object's method.

        Raises:
            WorkerError: the method raised an exception, or the process has died.
        """
        self._signal(signal.SIGCONT)
        try:
            self._connection.send((method, arguments))
        except OSError:
            raise WorkerError("its process has died") from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            failure, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError("its process has died") from None
        self._signal(signal.SIGSTOP)
        if failure is not None:
            raise WorkerError(failure)
        return value

    def close(self) -> None:
        """Asks the process to end, and kills it if it does not."""
        self._signal(signal.SIGCONT)
        self._connection.close()
        self._process.join(SECONDS_TO_END)
        self._signal(signal.SIGKILL)
        self._process.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid
        with suppress(ProcessLookupError):  # it has died, or is not yet in a group of its own
            os.killpg(self._process.pid, number)


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    connection: Connection, cpus: list[int], factory: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    """The main loop of a worker: answers calls until the other end closes."""
    os.setpgrp()  # its children are stopped with it; and if its parent is killed, the kernel ends a stopped group
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))
    target: list[object] = []
    _reply(connection, lambda: target.append(factory(*arguments)))
    while target:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        _reply(connection, lambda method=method, values=values: getattr(target[0], method)(*values))


def _reply(connection: Connection, work: Callable[[], object]) -> None:
    try:
        answer = (None, work())
    except Unavailable as reason:
        answer = (str(reason), None)
    except Exception as error:
        answer = (f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", None)
    connection.send(answer)
