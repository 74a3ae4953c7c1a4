"""Quiet calls of transformers, and the first line of its errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' warnings for ourselves to say better, and its progress bars for terminals."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The part of a library's exception that fits in a sentence."""
    text = f"KeyError {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    is_title = lines[0].endswith(":") and len(lines) > 1  # what it says comes next
    return (" ".join(lines[:2]) if is_title else lines[0]).rstrip(".:")
