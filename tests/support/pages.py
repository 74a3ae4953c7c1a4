"""Code blocks of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def ops_example() -> str:
    """The README's example of the ops, a program of its own."""
    (example,) = [code for code in blocks(ROOT / "README.md", "python") if "torch.ops.sq" in code]
    return example
