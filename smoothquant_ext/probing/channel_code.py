"""Spells a channel's number in powers of two, one digit a pass, and reads it where the channel arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

DIGIT_BASE = 16  # exponents are +-1 .. +-8: distinct, never 0 ("not this producer's"), far from fp16's limits


def digit_count(channels: int) -> int:
    """The number of passes that spell out any of so many channels."""
    return max(1, math.ceil(math.log(channels, DIGIT_BASE)))


def spell(channels: int, place: int) -> Tensor:
    """The exponents int64 [channels] that say one digit of every channel's number."""
    digit = torch.arange(channels) // DIGIT_BASE**place % DIGIT_BASE
    return torch.where(digit < 8, digit + 1, 7 - digit)


def append_digit(channel_map: Tensor, exponent: Tensor, place: int) -> Tensor:
    """Adds the digit that one pass gives each channel; a channel with exponent 0 is untouched, for good (-1)."""
    digit = torch.where(exponent > 0, exponent - 1, 7 - exponent)
    untouched = (exponent == 0) | (channel_map < 0)
    return torch.where(untouched, -1, channel_map + digit * DIGIT_BASE**place)


def read_exponents(before: Tensor, after: Tensor) -> Tensor | None:
    """The int64 exponents e [K] with ``after == before * 2**e``, 0 for silent channels; ``None`` if there are none."""
    if before.shape != after.shape or not bool(torch.isfinite(after).all()):
        return None
    subnormal = torch.finfo(before.dtype).tiny * torch.finfo(before.dtype).eps
    before, after = before.double(), after.double()
    size, scaled = before.abs().amax(0), after.abs().amax(0)
    audible = size > 2**12 * subnormal  # below that, underflow hides the factor
    if bool((scaled[audible] == 0).any()) or bool((scaled[~audible] > 2**22 * subnormal).any()):
        return None
    exponents = torch.where(audible, torch.log2(scaled / size).round(), 0.0)
    # Powers of two commute with rounding, except of subnormals; a threaded kernel may also sum in another order.
    tolerance = 1e-5 * scaled + subnormal * torch.exp2(exponents)
    if bool(((after - before * torch.exp2(exponents)).abs() > tolerance)[:, audible].any()):
        return None
    return exponents.long().cpu()


def mapped_channels(maps: Mapping[str, Tensor], channels: int) -> Tensor:
    """A mask of the producer's channels that any of the maps names."""
    mapped = torch.zeros(channels, dtype=torch.bool)
    for channel_map in maps.values():
        mapped[channel_map[channel_map >= 0]] = True
    return mapped
