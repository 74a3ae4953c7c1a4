"""Writes ops.md: every op of torch.ops.sq, with its schema, and what its wrapper in smoothquant_ext.ops says of it.

python docs/write_ops.py          # `make docs`
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from smoothquant_ext import ops

HERE = Path(__file__).parent
TARGET = HERE / "ops.md"
# The section of csrc/schemas.cpp that a schema stands in is its heading there, in these words.
SECTIONS = {
    "Quantize activations": "Quantizing activations",
    "Norms and activations": "Norms and activations that quantize",
    "8-bit matrix products": "Products",
    "The experts of a mixture": "Experts",
    "A whole layer": "Whole layers",
    "What stays in floating point": "In floating point",
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Ops",
        "",
        "<!-- Written by docs/write_ops.py from the schemas and docstrings; change those. -->",
        "",
        "`torch.ops.sq.*`, each with a typed wrapper of the same name in `smoothquant_ext.ops`, a fake kernel for",
        "`torch.compile`, and the same function in plain torch in `smoothquant_ext.reference`.",
        "",
        *inspect.cleandoc(ops.__doc__ or "").replace("``", "`").splitlines()[2:],
    ]
    for section, names in sections().items():
        lines += ["", f"## {section}"]
        for name in names:
            wrapper = getattr(ops, name)
            schema = str(getattr(torch.ops.sq, name).default._schema)
            lines += ["", f"### `{name}`", "", "```text", wrap(schema), "```", "", *described(wrapper)]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, list[str]]:
    """The public ops in the order of their schemas, by section."""
    found: dict[str, list[str]] = {}
    section = ""
    source = (HERE.parent / "csrc" / "schemas.cpp").read_text(encoding="utf-8")
    for line in re.findall(r"^  //.*$|m\.def\(\s*\"\w+", source, re.MULTILINE):
        if line.startswith("  //"):
            section = next((title for words, title in SECTIONS.items() if words in line), section)
        else:
            name = line.partition('"')[2]
            if callable(getattr(ops, name, None)) and name != "cpu_isa":
                found.setdefault(section, []).append(name)
    return found


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


def described(wrapper: object) -> list[str]:
    """A docstring in Markdown: literals in single backticks, arguments as a list."""
    text = re.sub(r"``", "`", inspect.getdoc(wrapper) or "")
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
