"""What is quantized and how: the schemes by name, and the recipe of one quantization run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, cast

import torch

from .errors import SmoothQuantError

QMAX: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
)
"""Largest magnitude of each 8-bit dtype. INT8 is symmetric: -128 is never used."""


Rounding: TypeAlias = Literal["nearest", "clip", "gptq"]
Clipping: TypeAlias = Literal["absmax", "percentile", "mse", "kl", "auto"]
AUTO = "auto"
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "clip", "gptq")
CLIPPINGS: tuple[Clipping, ...] = ("absmax", "percentile", "mse", "kl", "auto")


@dataclass(frozen=True)
class Scheme:
    """One way to run a linear layer in 8 bits.

    Attributes:
        name: what the command line calls it.
        dtype: 8-bit dtype of both the weight and the activation.
        weight: one scale per output ``"channel"``, or one per ``"tensor"``.
        activation: one scale per ``"token"``, measured at run time (dynamic), or one per ``"tensor"``, fixed by
            calibration (static).
        alpha: default migration strength for SmoothQuant (Xiao et al. 2022, eq. 4). Static activations share one scale
            among all channels, so they want more of the outliers moved into the weight.
        symmetric: whether the activation's scale spans the same range on both sides of zero. Others' checkpoints may
            have asymmetric ones, INT8 with a zero point; ``quantize`` makes none.
    """

    name: str
    dtype: torch.dtype
    weight: Literal["channel", "tensor"]
    activation: Literal["token", "tensor"]
    alpha: float
    symmetric: bool = True

    @property
    def is_static(self) -> bool:
        """True when activations use one calibrated scale instead of one measured per token."""
        return self.activation == "tensor"

    @property
    def per_token(self) -> Scheme:
        """The same with dynamic activations."""
        return scheme_of(self.dtype, self.weight, "token")


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("int8", torch.int8, "channel", "token", alpha=0.5),
            Scheme("int8-static", torch.int8, "channel", "tensor", alpha=0.8),
            Scheme("fp8", torch.float8_e4m3fn, "channel", "token", alpha=0.5),
            Scheme("fp8-static", torch.float8_e4m3fn, "tensor", "tensor", alpha=0.5),
            Scheme("fp8-e5m2", torch.float8_e5m2, "channel", "token", alpha=0.5),
        )
    }
)


def scheme_of(dtype: torch.dtype, weight: str, activation: str) -> Scheme:
    """The preset with these properties, or an unnamed scheme for the combinations that have no preset."""
    for scheme in SCHEMES.values():
        if (scheme.dtype, scheme.weight, scheme.activation) == (dtype, weight, activation):
            return scheme
    name = f"{str(dtype).removeprefix('torch.')}-{weight}-{activation}"
    kind = cast(Literal["channel", "tensor"], weight)
    return Scheme(name, dtype, kind, cast(Literal["token", "tensor"], activation), alpha=0.5)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of ``quantize`` besides the model and the calibration data.

    Attributes:
        scheme: a ``Scheme`` or the name of one in ``SCHEMES``.
        alpha: migration strength in [0, 1]; ``"auto"`` searches one for each smoothing group, by the error of its
            decoder block's output; ``None`` takes the scheme's default.
        smooth: ``False`` quantizes without smoothing.
        explicit: also smooth layers whose input no layer before them can be folded into (``fc2`` after a GELU): the
            scale is kept beside the weight and applied while the input is quantized. Only this package reads that.
        rounding: how weights are rounded, see ``rounding.round_weight``; ``None`` is ``"gptq"`` where alpha is
            ``"auto"``, else ``"nearest"``.
        clipping: how static activation scales are chosen, see ``clipping.choose_clips_``; ``None`` is ``"auto"`` where
            alpha is ``"auto"``, else ``"absmax"``. Dynamic scales are never clipped.
        auto_skip: leave so many linear layers out of 8 bits, those that do the most damage; below 1 a share of all.
        max_ppl_increase: leave as many out as it takes to keep the perplexity on held-out calibration text within this
            of the original's, relative: 0.005 is 0.5 %.
        skip: glob patterns of module names to leave in floating point, besides the output embedding and MoE routers.
        only: glob patterns of the only module names to quantize; empty means all.

    Raises:
        SmoothQuantError: for an unknown scheme, rounding or clipping, or a number out of its range.
    """

    scheme: Scheme | str = "int8"
    alpha: float | str | None = None
    smooth: bool = True
    explicit: bool = False
    rounding: Rounding | None = None
    clipping: Clipping | None = None
    auto_skip: float = 0
    max_ppl_increase: float | None = None
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str):
            if self.scheme not in SCHEMES:
                raise SmoothQuantError(f"unknown scheme {self.scheme!r}, expected one of {', '.join(SCHEMES)}")
            object.__setattr__(self, "scheme", SCHEMES[self.scheme])
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.resolved_scheme.alpha)
        if self.alpha != AUTO and not (isinstance(self.alpha, int | float) and 0.0 <= self.alpha <= 1.0):
            raise SmoothQuantError(f"alpha is {self.alpha}, expected a number between 0 and 1, or 'auto'")
        for name, chosen, allowed, tuned, default in (
            ("rounding", self.rounding, ROUNDINGS, "gptq", "nearest"),
            ("clipping", self.clipping, CLIPPINGS, "auto", "absmax"),
        ):
            if chosen is None:
                object.__setattr__(self, name, tuned if self.alpha == AUTO else default)
            elif chosen not in allowed:
                raise SmoothQuantError(f"{name} is {chosen!r}, expected one of {', '.join(allowed)}")
        if not 0 <= self.auto_skip < math.inf or (self.auto_skip >= 1 and self.auto_skip != int(self.auto_skip)):
            raise SmoothQuantError(f"auto_skip is {self.auto_skip}, expected a number of layers or a share below 1")
        if self.max_ppl_increase is not None and not self.max_ppl_increase > 0:
            raise SmoothQuantError(f"max_ppl_increase is {self.max_ppl_increase}, expected a number above 0")

    @property
    def resolved_scheme(self) -> Scheme:
        """The scheme itself, whichever way it was given."""
        assert isinstance(self.scheme, Scheme)
        return self.scheme

    @property
    def migration(self) -> float:
        """Alpha as a number: the one given, or where it is searched, the scheme's default."""
        return float(self.alpha) if isinstance(self.alpha, int | float) else self.resolved_scheme.alpha

    @property
    def clips(self) -> bool:
        """Whether static activation scales are chosen by more than the largest magnitude."""
        return self.resolved_scheme.is_static and self.clipping != "absmax"

    @property
    def skips(self) -> bool:
        """Whether the most damaging layers are left out."""
        return self.auto_skip > 0 or self.max_ppl_increase is not None

    @property
    def is_tuned(self) -> bool:
        """Whether more is done than one formula for all, which takes the whole calibration data block by block."""
        return self.alpha == AUTO or self.rounding != "nearest" or self.clips
