"""The report of one quantization run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.record import VERSION, package_version
from ..probing.numerics import outlier_ratio
from .recipe import Recipe


@dataclass
class Report:
    """What one run of ``quantize`` did.

    Attributes:
        recipe: the recipe it followed.
        quantized: names of the layers, and of the modules of experts, that now run in 8 bits.
        experts: those of them that hold the experts of a mixture.
        groups: the groups that were smoothed.
        failed: producers whose fold was undone, and producers that cannot be folded, each with the reason.
        unsmoothed: quantized layers whose input was not smoothed.
        skipped: layers left in floating point, with the reason.
        errors: squared error of each quantized layer's output on held-out rows, relative to the output's square.
        damages: the same of each decoder block's output, with all its layers quantized (see ``search.damage``).
        limits: where static scales are clipped, the largest magnitude kept relative to the largest seen, by layer.
        massive: inputs at which one token towers over the others: over the median one how much, and its position.
        per_token: layers of a static scheme whose input has a scale per token all the same, because one for all would
            not fit its tokens; experts always have.
        sensitivity: KL divergence of the model's predictions with nothing but these layers quantized, if measured.
        outliers: fp32 [K] absmax of each layer's input, before and after smoothing.
        fused: names of the norms and MLPs that run in one pass now.
        seconds: wall-clock seconds of each step.
        base: what the model was loaded from: a hub id, or the last part of a path; empty if that is not known.
        calibration: ``windows`` and ``tokens`` of the calibration data, and ``text`` where whoever read it says so.
    """

    recipe: Recipe
    quantized: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unsmoothed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    damages: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    massive: dict[str, tuple[float, int]] = field(default_factory=dict)
    per_token: list[str] = field(default_factory=list)
    sensitivity: dict[tuple[str, ...], float] = field(default_factory=dict)
    outliers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fused: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    base: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)


MOST_BINS = 128  # of channels, in what is kept of the outliers


def to_record(report: Report) -> dict[str, Any]:
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
                "ratio_before": outlier_ratio(before),
                "ratio_after": outlier_ratio(after),
            }
            for name, (before, after) in report.outliers.items()
        },
    }


def _binned(absmax: Tensor) -> list[float]:
    size = -(-len(absmax) // MOST_BINS)
    padded = torch.nn.functional.pad(absmax.float().cpu(), (0, -len(absmax) % size))
    return [float(f"{value:.4g}") for value in padded.reshape(-1, size).amax(1).tolist()]


@dataclass(frozen=True)
class SmoothedGroup:
    """What smoothing did to one group.

    Attributes:
        producer: name of the norm or linear layer whose output was divided by s; empty where s stays explicit.
        kind: ``"norm"``, ``"linear"`` or ``"explicit"``.
        consumers: names of the linear layers whose columns were multiplied by s.
        alpha: the migration strength used.
        outlier_before: largest channel absmax of the consumers' input over the median one, before smoothing.
        outlier_after: the same, after.
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    alpha: float
    outlier_before: float
    outlier_after: float
