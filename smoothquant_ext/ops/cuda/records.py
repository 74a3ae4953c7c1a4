"""What was proven on a GPU, and where that is kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).parents[2] / "validated_kernels.json"
"""Records that come with the package."""
VERSION = 1
"""Of the files; others are as good as none."""

RIGHT, WRONG, HUNG, COULD_NOT_RUN = "right", "wrong", "hung", "could not run"
LONGEST_WAIT = 600.0
"""Seconds to wait for another process that is proving; then this one does it too."""


class Key(NamedTuple):
    """What a proof depends on: with any other value it is made again."""

    gpu: str
    arch: int
    driver: str
    torch: str
    cublaslt: str
    library: str
    """The sha256 of the compiled library."""


class Verdict(NamedTuple):
    """What the proof says of a family of kernels: ``RIGHT``, or one of the others and why."""

    kind: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind == RIGHT


class Timing(NamedTuple):
    """The time of one product, a [m, k] and b [n, k], computed one way."""

    dtype: str
    way: str
    m: int
    n: int
    k: int
    microseconds: float


class Record(NamedTuple):
    """The proof of one kind of GPU."""

    key: Key
    date: str
    verdicts: dict[str, Verdict]
    """By family of kernels."""
    timings: tuple[Timing, ...]

    @property
    def is_final(self) -> bool:
        """Whether every family has been judged; what could not run may run the next time."""
        return all(verdict.kind != COULD_NOT_RUN for verdict in self.verdicts.values())


def to_json(record: Record) -> dict[str, Any]:
    return {
        "version": VERSION,
        "key": record.key._asdict(),
        "date": record.date,
        "verdicts": {family: list(verdict) for family, verdict in record.verdicts.items()},
        "timings": [list(timing) for timing in record.timings],
    }


def from_json(values: Any) -> Record:
    """Raises ``ValueError`` for what ``to_json`` has not made."""
    try:
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
        return Record(
            Key(**values["key"]),
            str(values["date"]),
            {family: Verdict(*map(str, verdict)) for family, verdict in values["verdicts"].items()},
            tuple(_timing(*timing) for timing in values["timings"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a record: {error!r}") from error


def _timing(dtype: str, way: str, m: int, n: int, k: int, microseconds: float) -> Timing:
    if not (isinstance(microseconds, float | int) and 0 < microseconds < math.inf):
        raise ValueError(f"a product took {microseconds!r} microseconds")
    return Timing(dtype, way, m, n, k, microseconds)


def read_shipped(path: Path = SHIPPED) -> list[Record]:
    """The records that come with the package.

    Raises:
        ValueError: the file is damaged.
    """
    return [from_json(each) for each in json.loads(path.read_text())["records"]]


def cache_folder() -> Path | None:
    """Where records are kept: the user's cache, else a private temporary folder, else nowhere.

    A folder in a shared place counts only if it is ours and nobody else may write there.
    """
    places = [Path(tempfile.gettempdir()) / f"smoothquant-ext-{os.getuid()}"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        places.insert(0, Path(cache) / "smoothquant-ext")
    return next((place for place in places if place.is_absolute() and _is_ours(place)), None)


def _is_ours(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return is_private and os.access(folder, os.W_OK | os.X_OK)


def record_path(folder: Path, key: Key) -> Path:
    """The file of a key."""
    digest = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:16]
    return folder / f"proof-{digest}.json"


def find(key: Key, folder: Path | None, shipped: Iterable[Record] = ()) -> Record | None:
    """The record of a key, or ``None``: an unreadable file is none."""
    for record in shipped:
        if record.key == key:
            return record
    if folder is None:
        return None
    try:
        record = from_json(json.loads(record_path(folder, key).read_text()))
    except (OSError, ValueError):
        return None
    return record if record.key == key else None


def store(record: Record, folder: Path | None) -> None:
    """Keeps a record that is final. A full or vanished disk only costs the next process another proof."""
    if folder is None or not record.is_final:
        return
    path = record_path(folder, record.key)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(json.dumps(to_json(record), indent=1) + "\n")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(key: Key, folder: Path | None, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a key, for which it waits while another process is proving; without a folder there is none.

    Args:
        on_wait: called once if the lock is taken.
    """
    if folder is None:
        yield
        return
    try:
        file = record_path(folder, key).with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with file:
        end = time.monotonic() + LONGEST_WAIT
        waits = False
        while time.monotonic() < end:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waits:
                    on_wait()
                waits = True
                time.sleep(0.1)
        yield
