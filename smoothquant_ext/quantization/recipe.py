"""The recipe of one quantization run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import SmoothQuantError
from ..scheme import SCHEMES, Scheme

Rounding: TypeAlias = Literal["nearest", "clip", "gptq"]
Clipping: TypeAlias = Literal["absmax", "percentile", "mse", "kl", "auto"]
Heads: TypeAlias = Literal["float", "8bit", "auto"]
AUTO, FLOAT = "auto", "float"
ROTATIONS = ("residual", "heads", "down", "inputs")
TRIED = ("residual", "heads", "down")  # by "auto" alone
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "clip", "gptq")
CLIPPINGS: tuple[Clipping, ...] = ("absmax", "percentile", "mse", "kl", "auto")
HEADS: tuple[Heads, ...] = ("float", "8bit", "auto")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of ``quantize`` besides the model and the calibration data.

    Attributes:
        scheme: a ``Scheme`` or the name of one in ``SCHEMES``.
        alpha: migration strength in [0, 1]; ``"auto"`` searches one for each smoothing group, by the error of its
            decoder block's output; ``None`` takes the scheme's default.
        smooth: ``False`` quantizes without smoothing.
        explicit: also smooth layers whose input no layer before them can be folded into (``fc2`` after a GELU): the
            scale is kept beside the weight and applied while the input is quantized. Only this package reads it.
        rounding: how weights are rounded, see ``rounding.round_weight``; ``None`` is ``"gptq"`` where alpha is
            ``"auto"``, else ``"nearest"``.
        clipping: how static activation scales are chosen, see ``clipping.choose_clips_``; ``None`` is ``"auto"`` where
            alpha is ``"auto"``, else ``"absmax"``. Dynamic scales are never clipped.
        auto_skip: the number of linear layers to leave out of 8 bits, those that cost the predictions the most; below 1
            a share of all.
        max_ppl_increase: leave out as many layers as needed to keep the perplexity on held-out calibration text within
            this of the original's, relative: 0.005 is 0.5 %.
        rotate: which activations are rotated, see ``rotation.rotate_``: some of ``ROTATIONS``, or their names in one
            text, ``"residual,heads"``; ``"none"`` or empty for none. With ``"auto"`` among them, they are made only if
            that is better, see ``rotation_choice.rotate_if_better_``; ``"auto"`` alone stands for ``TRIED``.
        head: ``"8bit"`` if the output embedding has 8 bits too, and with it the token embedding that shares its weight;
            ``"auto"`` if that costs the predictions next to nothing, see ``head.HeadQuantizer``; else ``"float"``. Its
            input is smoothed and, with INT8, rotated at run time, so only this package reads the checkpoint.
        skip: glob patterns of module names to leave in floating point, besides the output embedding and MoE routers.
        only: glob patterns of the only module names to quantize; empty means all.

    Raises:
        SmoothQuantError: for an unknown scheme, rounding, clipping or head, or a number out of its range.
    """

    scheme: Scheme | str = "int8"
    alpha: float | str | None = None
    smooth: bool = True
    explicit: bool = False
    rounding: Rounding | None = None
    clipping: Clipping | None = None
    auto_skip: float = 0
    max_ppl_increase: float | None = None
    rotate: str | Sequence[str] = ()
    head: Heads = "float"
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
        object.__setattr__(self, "rotate", _rotations(self.rotate))
        if self.head not in HEADS:
            raise SmoothQuantError(f"head is {self.head!r}, expected one of {', '.join(HEADS)}")
        if not 0 <= self.auto_skip < math.inf or (self.auto_skip >= 1 and self.auto_skip != int(self.auto_skip)):
            raise SmoothQuantError(f"auto_skip is {self.auto_skip}, expected a number of layers or a share below 1")
        if self.max_ppl_increase is not None and not self.max_ppl_increase > 0:
            raise SmoothQuantError(f"max_ppl_increase is {self.max_ppl_increase}, expected a number above 0")

    @property
    def resolved_scheme(self) -> Scheme:
        """The scheme, also where its name was given."""
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
        """Whether the most sensitive layers are left out."""
        return self.auto_skip > 0 or self.max_ppl_increase is not None

    @property
    def is_tuned(self) -> bool:
        """Whether alphas, rounding or scales are chosen by the whole calibration data, block by block."""
        return self.alpha == AUTO or self.rounding != "nearest" or self.clips

    @property
    def chooses_rotation(self) -> bool:
        """Whether a model is rotated only if that is better."""
        return AUTO in self.rotate

    @property
    def rotations(self) -> tuple[str, ...]:
        """The kinds of rotations to make, or to try."""
        kinds = tuple(kind for kind in self.rotate if kind != AUTO)
        return kinds or (TRIED if self.chooses_rotation else ())


def _rotations(given: Any) -> tuple[str, ...]:
    """What was given as a list.

    Raises:
        SmoothQuantError: something in it is no kind of rotation.
    """
    kinds = given.split(",") if isinstance(given, str) else given or ()
    expected = f"expected {AUTO}, none, or some of {', '.join(ROTATIONS)}"
    if not isinstance(kinds, list | tuple):
        raise SmoothQuantError(f"rotate is {given!r}, {expected}")
    kinds = tuple(dict.fromkeys(kind.strip() if isinstance(kind, str) else kind for kind in kinds))
    if kinds in (("",), ("none",)):
        return ()
    for kind in kinds:
        if kind not in (*ROTATIONS, AUTO):
            raise SmoothQuantError(f"rotate holds {kind!r}, {expected}")
    return kinds
