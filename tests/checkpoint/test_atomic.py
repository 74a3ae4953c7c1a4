"""Atomic directories, by killing a process at every line of the code that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import smoothquant_ext
from smoothquant_ext.checkpoint.atomic import check_free_space, check_place, replace_directory
from smoothquant_ext.errors import SmoothQuantError

CONTENT = {"old": {"a": "old a", "b": "old b"}, "new": {"a": "new a", "c": "new c"}}

# Forks one child for each line that replace_directory executes, kills the child there, and reports what is left.
# The package stands there without its __init__, which would import torch: a process without it forks in a tenth of the
# time.
KILLER = """
import json, os, sys, types
from pathlib import Path

package = sys.modules["smoothquant_ext"] = types.ModuleType("smoothquant_ext")
package.__path__ = [sys.argv[4]]
from smoothquant_ext.checkpoint import atomic

root, had_old = Path(sys.argv[1]), sys.argv[2] == "old"
content = json.loads(sys.argv[3])

def write(directory, files):
    for name, text in files.items():
        (directory / name).write_text(text)

def save(target):
    with atomic.replace_directory(target) as directory:
        write(directory, content["new"])

def run_and_die(target, at):
    lines = 0
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != atomic.__file__:
            return None
        lines += event == "line"
        if lines == at:
            os._exit(9)
        return trace
    sys.settrace(trace)
    save(target)
    sys.settrace(None)
    os._exit(0)

def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir()} if directory.is_dir() else None

at, report = 1, []
while True:
    parent = root / str(at)
    parent.mkdir()
    target = parent / "model"
    if had_old:
        target.mkdir()
        write(target, content["old"])
    child = os.fork()
    if child == 0:
        run_and_die(target, at)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left, others = contents(target), sorted(p.name for p in parent.iterdir() if p != target)
    kept = [contents(p) for p in parent.glob(".model.retired-*")]
    save(target)
    again = sorted(path.name for path in parent.iterdir())
    report.append({"status": status, "left": left, "others": others, "kept": kept,
                   "new": contents(target), "again": again})
    if status == 0:
        break
    at += 1
print(json.dumps(report))
"""


@pytest.mark.parametrize("previous", ["old", "none"])
def test_killed_at_any_line_leaves_the_old_directory_or_none(tmp_path: Path, previous: str) -> None:
    package = Path(smoothquant_ext.__file__).parent
    arguments = [sys.executable, "-c", KILLER, str(tmp_path), previous, json.dumps(CONTENT), str(package)]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    deaths = json.loads(output)
    assert len(deaths) > 40  # it did die at many places
    before = CONTENT["old"] if previous == "old" else None
    left = []
    for death in deaths:
        assert death["left"] in (before, None, CONTENT["new"]), "a directory in between"
        if death["left"] is None and before is not None:
            assert death["kept"] == [before], "the old directory is lost"
        assert all(name.startswith((".model.saving-", ".model.retired-")) for name in death["others"])
        assert death["new"] == CONTENT["new"], "the next save fails"
        assert death["again"] == ["model"], "the next save leaves litter"
        left.append(death["left"])
    assert before in left
    assert CONTENT["new"] in left


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replace_directory(tmp_path / "model") as directory:
            (directory / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_still_running_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replace_directory(target) as first:
        (first / "a").write_text("first")
        with replace_directory(target) as second:
            (second / "a").write_text("second")
        assert (first / "a").read_text() == "first"
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    unknown = tmp_path / ".model.saving-0123"  # abandoned or in use: it cannot be known, so it stays
    unknown.mkdir()
    with replace_directory(tmp_path / "model") as directory:
        (directory / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [unknown.name, "model"]


def test_names_with_glob_characters(tmp_path: Path) -> None:
    target = tmp_path / "model[1]*"
    abandoned = tmp_path / ".model[1]*.saving-0123"
    abandoned.mkdir()
    bystander = tmp_path / ".model1x.saving-0123"
    bystander.mkdir()
    with replace_directory(target) as directory:
        (directory / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, bystander.name])


def test_files_are_as_readable_as_the_directory(tmp_path: Path) -> None:
    with replace_directory(tmp_path / "model") as directory:
        (directory / "private").write_text("")
        (directory / "private").chmod(0o600)
        (directory / "below").mkdir()
        (directory / "below" / "private").touch(0o600)
    expected = (tmp_path / "model").stat().st_mode & 0o666
    assert (tmp_path / "model" / "private").stat().st_mode & 0o777 == expected
    assert (tmp_path / "model" / "below" / "private").stat().st_mode & 0o777 == expected


def test_a_failing_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.startswith(".model.saving-"):
            raise OSError(18, "Invalid cross-device link")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    refused = pytest.raises(SmoothQuantError, match=r"model could not be written: Invalid cross-device link")
    with refused, replace_directory(target) as directory:
        (directory / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "old"


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path / "not" / "yet" / "there")
    with pytest.raises(SmoothQuantError, match="name a directory below it"):
        check_place(Path("/"))
    with pytest.raises(SmoothQuantError, match="is a mount point"):
        check_place(Path("/proc"))
    (tmp_path / "file").touch()
    with pytest.raises(SmoothQuantError, match="file is not a directory"):
        check_place(tmp_path / "file" / "model")
    monkeypatch.setattr("os.access", lambda *arguments: False)  # root may write anywhere
    with pytest.raises(SmoothQuantError, match="is not writable"):
        check_place(tmp_path / "model")


def test_unwritable_parent_is_one_sentence() -> None:
    refused = pytest.raises(SmoothQuantError, match="/proc/nowhere/model could not be written")
    with refused, replace_directory(Path("/proc/nowhere/model")):
        raise AssertionError("not reached")


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "model", 1)
    with pytest.raises(SmoothQuantError, match=r"needs 1000000\.00 GB but .* GB free"):
        check_free_space(tmp_path / "model", 10**15)
