"""Arguments that do not fit: the compiled ops' own checks, which say the same sentences."""

from __future__ import annotations

from typing import Any

import torch


def check(name: str, *arguments: Any) -> None:
    """Calls ``torch.ops.sq._check_<name>``; see csrc/schemas.cpp for its arguments.

    Not while a graph is traced: the checks look at real tensors. The ops that these functions stand in for are checked
    when the graph runs.

    Raises:
        RuntimeError: for dtypes, shapes or devices that do not fit, in one sentence.
    """
    if not torch.compiler.is_compiling():
        getattr(torch.ops.sq, f"_check_{name}").default(*arguments)
