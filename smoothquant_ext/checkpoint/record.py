"""``smoothquant.json``, the record in a checkpoint of how it was made; ``smoothquant report`` shows it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import SmoothQuantError

RECORD = "smoothquant.json"
VERSION = 2


def package_version() -> str:
    """The version of this package, ``"unknown"`` where it runs from its source folder without being installed."""
    try:
        return version("smoothquant-ext")
    except PackageNotFoundError:
        return "unknown"


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        SmoothQuantError: the checkpoint has no record, or it cannot be read.
    """
    path = directory / RECORD
    if not path.is_file():
        raise SmoothQuantError(
            f"{directory} has no {RECORD}: only checkpoints that smoothquant quantize wrote have one"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise SmoothQuantError(f"{path} is not a record of version {VERSION}; quantize the model again")
    return value
