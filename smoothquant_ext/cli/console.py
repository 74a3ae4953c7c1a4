"""Output of the command line: results on stdout; progress, warnings and errors, a sentence each, on stderr."""

from __future__ import annotations

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

out = Console()
err = Console(stderr=True)


class Commands(TyperGroup):
    """The commands. Bad input prints one sentence in red and exits with 2; a warning prints one in yellow."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SmoothQuantError as error:
                _say("red", "error", str(error))
                raise typer.Exit(2) from error


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
