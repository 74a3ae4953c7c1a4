"""The shape of the sources: includes of csrc/ point down its floors, no file is too long to hold in the head."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
LONGEST = 400
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh", ".j2", ".sh"}
FOLDERS = ("smoothquant_ext", "csrc", "tests", "benchmarks", "tools")

# What each floor may include besides itself.
FLOORS: dict[str, tuple[str, ...]] = {
    "common": (),
    "cpu/kernels": ("common",),
    "cpu/compute": ("common", "cpu/kernels"),
    "cpu/ops": ("common", "cpu/kernels", "cpu/compute"),
    "cuda/kernels": ("common",),
    "cuda/compute": ("common", "cuda/kernels"),
    "cuda/ops": ("common", "cuda/kernels", "cuda/compute"),
    "": ("common",),  # schemas.cpp
}


def floor_of(path: str) -> str:
    return path.rpartition("/")[0]


def includes() -> dict[str, list[str]]:
    """The files of csrc/ that each of them includes."""
    found = {}
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            names = re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            found[str(path.relative_to(CSRC))] = names
    return found


INCLUDES = includes()


@pytest.mark.parametrize("path", INCLUDES)
def test_includes_point_down_from_the_root_of_csrc(path: str) -> None:
    allowed = {floor_of(path), *FLOORS[floor_of(path)]}
    for name in INCLUDES[path]:
        assert (CSRC / name).is_file(), f"{path} includes {name}, which is not a path from csrc/"
        assert floor_of(name) in allowed, f"{path} includes {name}, expected one of {sorted(allowed)}"


def test_includes_form_no_circle() -> None:
    done: set[str] = set()

    def visit(path: str, above: tuple[str, ...]) -> None:
        assert path not in above, f"{' -> '.join((*above, path))} is a circle"
        if path not in done:
            for name in INCLUDES[path]:
                visit(name, (*above, path))
            done.add(path)

    for path in INCLUDES:
        visit(path, ())


def test_no_file_is_too_long_to_hold_in_the_head() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES
    }
    assert lengths
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}
