"""The report of one quantization run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.record import VERSION, package_version
from ..probing.numerics import outlier_ratio
from .recipe import Recipe

MOST_BINS = 128  # of channels, in the record's absmax of a layer's input


@dataclass
class LayerReport:
    """Facts about one linear layer, or about the experts of one mixture.

    Attributes:
        before: fp32 [K], calibrated absmax of each channel of the input, before smoothing.
        after: the same after smoothing.
        alpha: migration strength of the group that smoothed the input; ``None`` where it is not smoothed.
        error: squared error of the output on held-out rows, relative to the output's square; ``None`` where it was not
            measured. Of a layer that then stayed in floating point, it is what 8 bits would have cost.
        limit: the largest magnitude that the static scale represents, relative to the largest one calibrated, where it
            was chosen.
        massive: where one token of the input towers over the others: its absmax over the median token's, and its
            position. Of layers that share an input, the first has it.
        per_token: whether a layer of a static scheme has a scale per token, because one for all would not fit its
            tokens; experts and the output embedding always have.
    """

    before: Tensor
    after: Tensor
    alpha: float | None = None
    error: float | None = None
    limit: float | None = None
    massive: tuple[float, int] | None = None
    per_token: bool = False

    def to_record(self) -> dict[str, Any]:
        """The fields as plain numbers: up to ``MOST_BINS`` bins of neighbouring channels, each with its largest absmax.

        ``ratio_before`` and ``ratio_after`` are those of the largest channel to the median one.
        """
        record = {name: _binned(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return record | {"ratio_before": outlier_ratio(self.before), "ratio_after": outlier_ratio(self.after)}


@dataclass
class BlockReport:
    """Facts about one decoder block.

    Attributes:
        error: of its output on held-out data, with all its layers quantized (see ``alpha_search.block_error``).
        inputs: for each input of its linear layers the names of those that share it.
    """

    error: float
    inputs: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class SmoothedGroup:
    """One smoothed group.

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


@dataclass(frozen=True)
class UnitReport:
    """The sensitivity of the model to one unit.

    Attributes:
        layers: names of the layers that share an input.
        kl: KL divergence of the model's predictions, nats per token, with nothing but these layers quantized.
    """

    layers: tuple[str, ...]
    kl: float


@dataclass
class Rotations:
    """What was rotated.

    Attributes:
        residual: whether the residual stream was.
        heads: for each layer behind an attention whose values are rotated the channels of a head.
        inputs: for each layer whose input is rotated at run time, and for experts, the size of its blocks; what the
            ``down`` of experts reads is under their name and ``.down``.
        untied: bytes that a head takes which shared its weight with the token embedding.
        refused: why the residual stream, or with ``"auto"`` nothing at all, was not rotated, or ''.
        errors: where a choice was measured, the mean error of some blocks, quantized: not rotated, and rotated.
    """

    residual: bool = False
    heads: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    untied: int = 0
    refused: str = ""
    errors: tuple[float, float] | None = None


@dataclass
class HeadReport:
    """Facts about the output embedding that was quantized, or might have been.

    Attributes:
        name: its name.
        embedding: the name of the token embedding that shares its weight, or ''.
        kl: KL divergence of the model's predictions, nats per token, with nothing but these in 8 bits (see
            ``head_cost.added_kl``).
    """

    name: str
    embedding: str
    kl: float


@dataclass
class Report:
    """The facts of one run of ``quantize``.

    Attributes:
        recipe: the recipe it followed.
        quantized: names of the layers, and of the modules of experts, that now run in 8 bits.
        experts: those of them that hold the experts of a mixture.
        skipped: layers left in floating point, with the reason.
        layers: facts about every calibrated layer, by name; some of these stay in floating point.
        blocks: facts about every decoder block whose calls could be recorded, by name.
        groups: the groups that were smoothed.
        failed: producers whose fold was undone, and producers that cannot be folded, each with the reason.
        sensitivity: of each unit, if it was measured.
        fused: names of the norms, MLPs and so on that run in one pass now.
        seconds: wall-clock seconds of each step.
        base: where the model was loaded from: a hub id, or the last part of a path; empty if that is not known.
        rotations: what was rotated.
        head: the output embedding, if it was to be quantized.
        calibration: ``windows`` and ``tokens`` of the calibration data, and the name of the ``text`` where it is known.
    """

    recipe: Recipe
    quantized: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerReport] = field(default_factory=dict)
    blocks: dict[str, BlockReport] = field(default_factory=dict)
    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    sensitivity: list[UnitReport] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    base: str = ""
    calibration: dict[str, Any] = field(default_factory=dict)
    rotations: Rotations = field(default_factory=Rotations)
    head: HeadReport | None = None

    @property
    def unsmoothed(self) -> list[str]:
        """Names of quantized layers whose input was not smoothed."""
        return self._quantized_where(name for name, layer in self.layers.items() if layer.alpha is None)

    @property
    def per_token(self) -> list[str]:
        """Names of quantized layers of a static scheme that have a scale per token all the same."""
        return self._quantized_where(name for name, layer in self.layers.items() if layer.per_token)

    def _quantized_where(self, names: Iterable[str]) -> list[str]:
        chosen = set(names)
        return [name for name in self.quantized if name in chosen]

    def to_record(self) -> dict[str, Any]:
        """The report in plain numbers and names, as ``save`` writes it.

        The keys are the fields, and besides ``version``, ``package``, and ``measured``: rows of
        ``model_card.measured_facts``, none yet. The recipe has its scheme by name.
        """
        layers = {name: layer.to_record() for name, layer in self.layers.items()}
        recipe = asdict(self.recipe) | {"scheme": self.recipe.resolved_scheme.name}
        header = {"version": VERSION, "package": package_version(), "measured": []}
        return header | asdict(replace(self, layers={})) | {"recipe": recipe, "layers": layers}


def _binned(absmax: Tensor) -> list[float]:
    size = -(-len(absmax) // MOST_BINS)
    padded = torch.nn.functional.pad(absmax.float().cpu(), (0, -len(absmax) % size))
    return [float(f"{value:.4g}") for value in padded.reshape(-1, size).amax(1).tolist()]
