"""The 8-bit schemes by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast

import torch

QMAX: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
)
"""Largest magnitude of each 8-bit dtype. INT8 is symmetric: -128 is never used."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A scale below it is subnormal, which processors may take for 0: numbers so small are zeros."""


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


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations spell it, such as ``int8``, ``float8_e4m3fn`` or ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def scheme_of(dtype: torch.dtype, weight: str, activation: str) -> Scheme:
    """The preset with these properties, or an unnamed scheme for the combinations that have no preset."""
    for scheme in SCHEMES.values():
        if (scheme.dtype, scheme.weight, scheme.activation) == (dtype, weight, activation):
            return scheme
    name = f"{dtype_name(dtype)}-{weight}-{activation}"
    kind = cast(Literal["channel", "tensor"], weight)
    return Scheme(name, dtype, kind, cast(Literal["token", "tensor"], activation), alpha=0.5)
