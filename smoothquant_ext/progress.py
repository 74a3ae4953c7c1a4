"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import rich.progress
from rich.console import Console

Item = TypeVar("Item")


def track(items: Iterable[Item], what: str, show: bool = True) -> Iterable[Item]:
    """Yields the items and shows a progress bar with the text ``what``."""
    return rich.progress.track(items, what.ljust(24), console=Console(stderr=True), disable=not show)


def say(sentence: str, show: bool = True) -> None:
    """Prints a line between progress bars."""
    if show:
        Console(stderr=True).print(sentence, soft_wrap=True, highlight=False, markup=False)
