"""Atomic replacement of directories and files: they appear whole or not at all.

A new directory is filled under a temporary name beside its target, flushed to the disk, and renamed. A process that is
killed leaves the old directory or none, plus a hidden sibling that the next save to the same target removes.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SmoothQuantError

FILLING = "saving"  # .NAME.saving-XXXX: being filled
RETIRED = "retired"  # .NAME.retired-XXXX: the previous directory, to be removed


def check_place(target: Path) -> None:
    """Raises SmoothQuantError unless ``target`` can be replaced by a directory or created as one."""
    if not target.name:
        raise SmoothQuantError(f"{target} cannot be replaced; name a directory below it")
    if target.is_dir() and target.is_mount():
        raise SmoothQuantError(f"{target} is a mount point, which cannot be replaced; name a directory inside it")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir():
        raise SmoothQuantError(f"{target} cannot be made because {existing} is not a directory; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SmoothQuantError(f"{target} cannot be made because {existing} is not writable; choose another place")


def check_free_space(target: Path, needed: int) -> None:
    """Raises SmoothQuantError unless the file system of ``target`` has ``needed`` bytes free."""
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SmoothQuantError(
            f"{target} needs {needed / 1e9:.2f} GB but {existing} has {free / 1e9:.2f} GB free; "
            "free some space or choose another place"
        )


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill, which replaces ``target`` when the block ends without an exception.

    Replacing an existing ``target`` takes two renames. A process killed between them leaves the old directory under its
    retired name, and the next save keeps it until the new one is in place.

    Raises:
        SmoothQuantError: the file system refuses (full, read-only, gone).
    """
    unfinished = target.parent / f".{target.name}.{FILLING}-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in _siblings(target, FILLING):
            with _locked(leftover) as abandoned:
                if abandoned:
                    shutil.rmtree(leftover, ignore_errors=True)
        unfinished.mkdir()
        with _locked(unfinished):
            yield unfinished
            _flush(unfinished)
            _publish(unfinished, target)
    except OSError as error:
        raise SmoothQuantError(
            f"{target} could not be written: {error.strerror or error}; free some space there or choose another place"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # a no-op once it is published


def replace_file(target: Path, text: str) -> None:
    """Writes a text file, UTF-8, that appears whole or not at all.

    Raises:
        SmoothQuantError: it cannot be written.
    """
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(target)
    except OSError as error:
        raise SmoothQuantError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _publish(unfinished: Path, target: Path) -> None:
    retired = target.parent / unfinished.name.replace(f".{FILLING}-", f".{RETIRED}-")
    if target.is_dir():
        target.rename(retired)
    try:
        unfinished.rename(target)
    except OSError:
        if retired.is_dir():
            retired.rename(target)
        raise
    _fsync(target.parent)
    for leftover in _siblings(target, RETIRED):
        shutil.rmtree(leftover, ignore_errors=True)


def _siblings(target: Path, purpose: str) -> Iterator[Path]:
    return target.parent.glob(f".{glob.escape(target.name)}.{purpose}-*")


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Holds the lock that marks a directory as in use; the system releases it when the process ends.

    Yields whether it was acquired: false while another process holds it, and on file systems without locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _flush(directory: Path) -> None:
    """Flushes the files and their names to the disk, and makes files as readable as the directory.

    safetensors makes them private.
    """
    readable = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(readable)
        _fsync(path)
    _fsync(directory)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
