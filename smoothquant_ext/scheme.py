"""What is quantized and how: the schemes by name, and the recipe of one quantization run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from .errors import SmoothQuantError

QMAX: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
)
"""Largest magnitude of each 8-bit dtype. INT8 is symmetric: -128 is never used."""


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
    """

    name: str
    dtype: torch.dtype
    weight: Literal["channel", "tensor"]
    activation: Literal["token", "tensor"]
    alpha: float

    @property
    def is_static(self) -> bool:
        """True when activations use one calibrated scale instead of one measured per token."""
        return self.activation == "tensor"


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


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of ``quantize`` besides the model and the calibration data.

    Attributes:
        scheme: a ``Scheme`` or the name of one in ``SCHEMES``.
        alpha: migration strength in [0, 1]; ``None`` takes the scheme's default.
        smooth: ``False`` quantizes without smoothing.
        skip: glob patterns of module names to leave in floating point, besides the output embedding and MoE routers.
        only: glob patterns of the only module names to quantize; empty means all.

    Raises:
        SmoothQuantError: for an unknown scheme or an alpha outside [0, 1].
    """

    scheme: Scheme | str = "int8"
    alpha: float | None = None
    smooth: bool = True
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str):
            if self.scheme not in SCHEMES:
                raise SmoothQuantError(f"unknown scheme {self.scheme!r}, expected one of {', '.join(SCHEMES)}")
            object.__setattr__(self, "scheme", SCHEMES[self.scheme])
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.resolved_scheme.alpha)
        if not 0.0 <= self.migration <= 1.0:
            raise SmoothQuantError(f"alpha is {self.alpha}, expected a number between 0 and 1")

    @property
    def resolved_scheme(self) -> Scheme:
        """The scheme itself, whichever way it was given."""
        assert isinstance(self.scheme, Scheme)
        return self.scheme

    @property
    def migration(self) -> float:
        """Alpha as a number: the one given, or the scheme's default."""
        assert self.alpha is not None
        return self.alpha
