"""Records of proofs: they are kept for the same key only, by one process at a time, in a place of the user's own."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from smoothquant_ext.ops.cuda import records
from smoothquant_ext.ops.cuda.records import COULD_NOT_RUN, RIGHT, WRONG, Key, Record, Timing, Verdict

KEY = Key("NVIDIA H100", 90, "580.65.06", "2.13.0", "130100", "abc")
RECORD = Record(
    KEY,
    "2026-12-01",
    {"quantize": Verdict(RIGHT), "mma_int8": Verdict(WRONG, "w8a8_gemm(...)")},
    (Timing("int8", "library", 1, 4096, 4096, 8.5),),
)


WRONG_TIMES = [json.dumps(records.to_json(RECORD)).replace("8.5", time) for time in ('"8.5"', "0", "-1", "NaN", "null")]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_record_comes_back_for_its_own_key(tmp_path: Path) -> None:
    records.store(RECORD, tmp_path)
    assert records.find(KEY, tmp_path) == RECORD
    for field in Key._fields:
        other = KEY._replace(**{field: 80 if field == "arch" else "other"})
        assert records.find(other, tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 1


def test_what_could_not_run_is_not_kept(tmp_path: Path) -> None:
    verdicts = RECORD.verdicts | {"quantize": Verdict(COULD_NOT_RUN, "no memory")}
    records.store(RECORD._replace(verdicts=verdicts), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"version": 0}', json.dumps(records.to_json(RECORD))[:-9], "\udcff", *WRONG_TIMES],
    ids=ascii,
)
def test_a_damaged_record_is_none(tmp_path: Path, text: str) -> None:
    records.record_path(tmp_path, KEY).write_text(text, errors="surrogateescape")
    assert records.find(KEY, tmp_path) is None


def test_a_full_disk_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    records.store(RECORD, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shipped_records_come_first(tmp_path: Path) -> None:
    assert records.find(KEY, None, [RECORD]) == RECORD
    path = tmp_path / "shipped.json"
    path.write_text(json.dumps({"about": "", "records": [records.to_json(RECORD)]}))
    assert records.read_shipped(path) == [RECORD]
    path.write_text('{"records": [{"version": 1}]}')
    with pytest.raises(ValueError, match="not a record"):
        records.read_shipped(path)


def test_what_is_shipped_can_be_read() -> None:
    assert all(record.is_final for record in records.read_shipped())


# --- where records are kept -----------------------------------------------------------------------------------------


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = records.cache_folder()
    assert folder == tmp_path / "cache" / "smoothquant-ext"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert records.cache_folder() == tmp_path / "home" / ".cache" / "smoothquant-ext"


@pytest.mark.parametrize("cache", ["/dev/null/no", "relative"])
def test_without_a_home_it_is_a_private_temporary_folder(
    cache: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    folder = records.cache_folder()
    assert folder == temporary / f"smoothquant-ext-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_to_is_none(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/no")
    folder = temporary / f"smoothquant-ext-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert records.cache_folder() is None
    folder.rmdir()
    folder.symlink_to(temporary.parent)
    assert records.cache_folder() is None


def test_a_folder_of_somebody_else_is_none(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/no")
    mine = os.getuid()
    (temporary / f"smoothquant-ext-{mine + 1}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert records.cache_folder() is None


def test_without_a_place_nothing_is_kept() -> None:
    records.store(RECORD, None)
    assert records.find(KEY, None) is None
    with records.one_at_a_time(KEY, None, lambda: pytest.fail("there is no lock to wait for")):
        pass


# --- one process at a time ------------------------------------------------------------------------------------------


def test_others_wait(tmp_path: Path) -> None:
    order: list[str] = []
    holds, waits = threading.Event(), threading.Event()

    def first() -> None:
        with records.one_at_a_time(KEY, tmp_path, lambda: None):
            holds.set()
            assert waits.wait(10)
            order.append("first")

    def second() -> None:
        with records.one_at_a_time(KEY, tmp_path, waits.set):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert holds.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "second"]


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_WAIT", 0.3)
    with records.one_at_a_time(KEY, tmp_path, lambda: None), records.one_at_a_time(KEY, tmp_path, lambda: None):
        pass
