"""Reads text, conversations among it, and draws windows of tokens from it for calibration and tests."""

from .documents import read_text
from .windows import CHARACTERS_PER_TOKEN, token_windows

__all__ = ["CHARACTERS_PER_TOKEN", "read_text", "token_windows"]
