"""Reads images and sounds from the folders and files that a user names."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compat import first_line
from .errors import SmoothQuantError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aiff")
CAPTIONS = "metadata.jsonl"  # beside the images, with file_name and text, as datasets' imagefolder has it
LONGEST = 30  # seconds of a sound; of a longer one a part is read, from anywhere


def find_media(source: str, suffixes: Sequence[str], seed: int) -> list[Path]:
    """The files with one of these endings in a folder, searched recursively, in an order that the seed gives.

    Raises:
        SmoothQuantError: there is no such file or folder, or nothing of the kind in it.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise SmoothQuantError(f"{path} does not exist: give a folder of files that end in {', '.join(suffixes)}")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [file for file in files if file.suffix.lower() in suffixes and file.is_file()]
    if not found:
        raise SmoothQuantError(f"{path} holds no file that ends in {', '.join(suffixes)}")
    return random.Random(seed).sample(found, len(found))


def read_image(path: Path) -> Any:
    """An image of Pillow's, in RGB.

    Raises:
        SmoothQuantError: Pillow is missing, or cannot read the file.
    """
    try:
        from PIL import Image
    except ImportError:
        raise SmoothQuantError(f"{path} needs the package pillow to be read; install smoothquant-ext[media]") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # of the many formats, each with errors of its own
        raise SmoothQuantError(f"{path} cannot be read as an image ({first_line(error)})") from error


def read_captions(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """The images that have a caption, and it: in metadata.jsonl of their folder, or in a .txt file of their name.

    Raises:
        SmoothQuantError: a metadata.jsonl has a line that is no JSON.
    """
    tables: dict[Path, Mapping[str, str]] = {}
    for file in files:
        if file.parent not in tables:
            tables[file.parent] = _captions_of(file.parent / CAPTIONS)
        beside = file.with_suffix(".txt")
        caption = tables[file.parent].get(file.name)
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8", errors="replace")
        if caption and caption.strip():
            yield file, caption.strip()


def _captions_of(table: Path) -> Mapping[str, str]:
    lines = table.read_text(encoding="utf-8", errors="replace").split("\n") if table.is_file() else []
    rows = [_row_of(table, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return {str(row["file_name"]): str(row["text"]) for row in rows if row.get("text") is not None}


def _row_of(table: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or "file_name" not in row:
        raise SmoothQuantError(f"line {number} of {table} is no JSON with 'file_name' and 'text': correct it")
    return row


def read_sound(path: Path, rate: int, seed: int = 0) -> NDArray[np.float32]:
    """At most ``LONGEST`` seconds of a sound, one channel, ``rate`` samples a second.

    Raises:
        SmoothQuantError: soundfile or soxr is missing, or the file cannot be read.
    """
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:  # without libsndfile the latter
        missing = getattr(error, "name", None) or "soundfile"
        raise SmoothQuantError(
            f"{path} needs the package {missing} to be read; install smoothquant-ext[media]"
        ) from None
    try:
        with soundfile.SoundFile(path) as file:
            wanted = LONGEST * file.samplerate
            if file.frames > wanted:
                file.seek(random.Random(seed).randrange(file.frames - wanted))
            samples = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)
            given = file.samplerate
    except (soundfile.SoundFileError, OSError) as error:
        raise SmoothQuantError(f"{path} cannot be read as a sound ({first_line(error)})") from error
    if not len(samples):
        raise SmoothQuantError(f"{path} is a sound without samples: leave it out")
    resampled: NDArray[np.float32] = samples if given == rate else soxr.resample(samples, given, rate)
    return resampled
