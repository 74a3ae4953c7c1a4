"""Writes docs/ops.md: every op of torch.ops.sq, with its schema and docstring, by the modules of smoothquant_ext.ops.

python tools/write_ops.py          # `make docs`
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import torch

from smoothquant_ext import ops
from smoothquant_ext.ops.declare import DECLARED

TARGET = Path(__file__).parents[1] / "docs" / "ops.md"


def page() -> str:
    """The whole page."""
    lines = [
        "# Ops",
        "",
        "<!-- Written by tools/write_ops.py from the declarations in smoothquant_ext/ops/; change those. -->",
        "",
        "`torch.ops.sq.*`, each under the same name in `smoothquant_ext.ops`, with a fake kernel for `torch.compile`,",
        "and in plain torch in `smoothquant_ext.reference`.",
        "",
        *inspect.cleandoc(ops.__doc__ or "").replace("``", "`").splitlines()[2:],
    ]
    for section, names in sections().items():
        lines += ["", f"## {section}"]
        for name in names:
            schema = str(getattr(torch.ops.sq, name).default._schema)
            lines += ["", f"### `{name}`", "", "```text", wrap(schema), "```", "", *described(DECLARED[name].fake)]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, list[str]]:
    """The names of the ops by the first sentence of the docstring of the module that declares them."""
    names: dict[str, list[str]] = {}
    for name, declaration in DECLARED.items():
        title = (inspect.getdoc(sys.modules[declaration.fake.__module__]) or "").partition(".")[0]
        names.setdefault(title, []).append(name)
    return names


def wrap(schema: str) -> str:
    """A schema in lines that fit a page."""
    if len(schema) <= 110:
        return schema
    head, _, rest = schema.partition("(")
    arguments, _, result = rest.rpartition(") -> ")
    lines, line = [], "    "
    for argument in re.split(r", (?![^(]*\))", arguments):
        if len(line) + len(argument) > 108:
            lines.append(line.rstrip())
            line = "    "
        line += argument + ", "
    return "\n".join([f"{head}(", *lines, line.rstrip(", "), f") -> {result}"])


def described(function: object) -> list[str]:
    """A docstring in Markdown: literals in single backticks, arguments as a list."""
    text = re.sub(r"``", "`", inspect.getdoc(function) or "")
    lines: list[str] = []
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises):", line):
            lines += [f"**{heading[1].replace('Args', 'Arguments')}**", ""]
        elif argument := re.fullmatch(r"    (\w+): (.*)", line):
            lines.append(f"- `{argument[1]}`: {argument[2]}")
        elif line.startswith("        "):
            lines.append("  " + line.strip())
        elif line.startswith("    "):
            lines.append(line.strip())
        else:
            lines.append(line)
    return lines


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
