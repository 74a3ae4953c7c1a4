"""The record that a checkpoint keeps of how it was made, ``smoothquant.json``: what ``smoothquant report`` shows."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import SmoothQuantError
from .quantize import Report

RECORD = "smoothquant.json"
VERSION = 1
MOST_BINS = 128  # of channels, in what is kept of the outliers


def package_version() -> str:
    """This package's, ``"unknown"`` where it runs from its source folder without being installed."""
    try:
        return version("smoothquant-ext")
    except PackageNotFoundError:
        return "unknown"


def record(report: Report) -> dict[str, Any]:
    """A report as plain numbers and names.

    Keys: ``version``, ``package``, ``base``, ``calibration``, ``measured`` (rows of ``card.measured_facts``; none yet),
    ``recipe`` (its fields; ``scheme`` by name), ``quantized``, ``skipped``, ``failed``,
    ``unsmoothed``, ``groups`` (see ``SmoothedGroup``), ``errors``, ``damages``, ``limits``, ``massive``, ``per_token``,
    ``sensitivity`` (a list of ``{"layers", "kl"}``), ``seconds``, and ``outliers``: for each layer ``before`` and
    ``after``, the absmax of its input's channels (the largest of each of up to 128 bins of neighbours), and the
    ``ratio_before`` and ``ratio_after`` of the largest channel to the median one.
    """
    recipe = asdict(report.recipe) | {"scheme": report.recipe.resolved_scheme.name}
    return {
        "version": VERSION,
        "package": package_version(),
        "base": report.base,
        "calibration": report.calibration,
        "measured": [],
        "recipe": recipe,
        "quantized": report.quantized,
        "skipped": report.skipped,
        "failed": report.failed,
        "unsmoothed": report.unsmoothed,
        "groups": [asdict(group) for group in report.groups],
        "errors": report.errors,
        "damages": report.damages,
        "limits": report.limits,
        "per_token": report.per_token,
        "massive": {name: list(found) for name, found in report.massive.items()},
        "sensitivity": [{"layers": list(layers), "kl": kl} for layers, kl in report.sensitivity.items()],
        "seconds": report.seconds,
        "outliers": {
            name: {
                "before": _binned(before),
                "after": _binned(after),
                "ratio_before": _ratio(before),
                "ratio_after": _ratio(after),
            }
            for name, (before, after) in report.outliers.items()
        },
    }


def read_record(directory: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        SmoothQuantError: there is none, or it cannot be read.
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


def _binned(absmax: Tensor) -> list[float]:
    size = -(-len(absmax) // MOST_BINS)
    padded = torch.nn.functional.pad(absmax.float().cpu(), (0, -len(absmax) % size))
    return [float(f"{value:.4g}") for value in padded.reshape(-1, size).amax(1).tolist()]


def _ratio(absmax: Tensor) -> float:
    return float(absmax.max() / absmax.median().clamp(min=torch.finfo(torch.float32).tiny))
