"""Output of the command line: results on stdout; progress, warnings and errors, a sentence each, on stderr."""

from __future__ import annotations

import errno
import io
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..errors import SmoothQuantError

NARROWEST = 80  # characters; in fewer, tables would drop digits


def readable(console: Console) -> Console:
    """Makes a console of a narrow terminal wider, in place: the terminal then wraps the lines."""
    if console.width < NARROWEST:
        console.width = NARROWEST
    return console


out = readable(Console(markup=False))  # names may hold brackets
err = Console(stderr=True)


class Commands(TyperGroup):
    """The commands. Bad input prints one sentence in red and exits with 2; a warning prints one in yellow.

    What the system refuses (a full disk, a file without permission) is bad input, too.
    """

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SmoothQuantError as error:
                _say("red", "error", str(error))
                raise typer.Exit(2) from error
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader of the output has gone, as `head` does
                    raise
                said = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
                _say("red", "error", f"{error.filename or 'the system'}: {said}")
                raise typer.Exit(2) from error


def print_any_character() -> None:
    """Lets output hold characters that the terminal's encoding lacks; they are printed as question marks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None if it is closed
            stream.reconfigure(errors="replace")


@contextmanager
def step(what: str, spinner: bool = True) -> Iterator[None]:
    """Prints the name of a step and then its duration; no spinner while another library draws a progress bar."""
    start = time.perf_counter()
    if not spinner:
        err.print(f"{escape(what)} ...", soft_wrap=True, highlight=False)
    with err.status(escape(what)) if spinner else nullcontext():
        yield
    err.print(f"{escape(what)} [dim]({time.perf_counter() - start:.1f} s)[/dim]", soft_wrap=True, highlight=False)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _say("yellow", "warning", str(message))


def _say(color: str, what: str, sentence: str) -> None:
    err.print(f"[{color}]{what}:[/{color}] {escape(sentence)}", soft_wrap=True, highlight=False)
