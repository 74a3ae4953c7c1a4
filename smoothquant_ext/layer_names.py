"""Many layer names in few words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> the names it holds for. Reasons that differ in block numbers or amounts count as one."""
    names: dict[str, list[str]] = {}
    wording: dict[str, str] = {}
    for name, reason in reasons.items():
        key = re.sub(r"\d[\d.e+-]*", "*", reason)
        wording.setdefault(key, reason)
        names.setdefault(key, []).append(name)
    return {wording[key]: members for key, members in names.items()}


def collapse(names: Iterable[str]) -> str:
    """Modules' names in a line, those that differ in numbers only as one pattern and their count."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name_pattern(name)] = counts.get(name_pattern(name), 0) + 1
    return ", ".join(f"{pattern} ({count})" if "*" in pattern else pattern for pattern, count in counts.items())


def name_pattern(name: str) -> str:
    """A module's name with the numbers of blocks and experts as ``*``, as ``--skip`` takes it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
