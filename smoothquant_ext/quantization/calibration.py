"""Calibration: the largest magnitude that each input channel of each linear layer takes on real data."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from ..hadamard import rotate_blocks
from ..probing.batches import Batches
from ..probing.blocks import Batch, count_tokens, run_model, token_ids
from ..probing.hooks import hooked
from ..probing.linears import find_linears, weight_nk
from ..probing.lookups import find_limits
from ..probing.values import first_argument
from ..scheme import Scheme
from .block_inputs import BlockInputRecorder
from .expert_smoothing import HiddenRanges

HELD_OUT_SHARE = 4  # every fourth batch at most
HELD_OUT_TOKENS = 2048  # are enough to measure choices on
TOKENS_PER_CHANNEL = 4  # of the widest input: GPTQ's Hessian would lack directions with fewer than one
FEWEST_WINDOWS, MOST_WINDOWS = 16, 128
NO_BATCH = "there is no calibration batch; pass at least one batch of token ids [B, T]"


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recorder: BlockInputRecorder | None = None,
    records: Callable[[int], bool] = lambda _: True,
    hidden: HiddenRanges | None = None,
    rotated: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Runs the model over the batches and keeps a running absmax per input channel: O(features) memory.

    Args:
        model: the model, in floating point.
        layers: the linear layers, and experts of mixtures, to watch, by name.
        batches: token ids [B, T] or forward arguments, as ``Batches`` gives them; any iterable, consumed once.
        recorder: also records the calls of the blocks, in the batches for whose number ``records`` is true.
        records: which batches are recorded; asked after the batch was drawn.
        hidden: also measures the values within experts.
        rotated: of layers whose input is rotated at run time the size of its blocks; what they read is rotated then.

    Returns:
        fp32 absmax [K] for each layer that ran, in the order in which the layers ran.

    Raises:
        SmoothQuantError: there is no batch, or a layer received a NaN or an infinity.
    """
    absmax: dict[str, Tensor] = {}

    def measure(name: str, args: Any, kwargs: Any) -> None:
        x = first_argument(args, kwargs)
        if x is None or x.numel() == 0:  # an expert may be given no token
            return
        x = rotate_blocks(x.detach(), rotated.get(name, 0))
        largest = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).float()
        absmax[name] = torch.maximum(absmax[name], largest) if name in absmax else largest

    base = getattr(model, "base_model", model)  # of transformers: the model without its head
    before_head = set(base.modules()) if base is not model else set()
    all_logits = not before_head.issuperset(layers.values())
    count = 0
    with hooked(layers, before=measure), hidden.measuring() if hidden is not None else nullcontext():
        for batch in batches:
            with recorder.recording() if recorder is not None and records(count) else nullcontext():
                run_model(model, batch, all_logits)
            count += 1
            check_finite(absmax, count)
    if count == 0:
        raise SmoothQuantError(NO_BATCH)
    return absmax


def rotated_ranges(rotated: Mapping[str, int], scheme: Scheme) -> Mapping[str, int]:
    """Of layers whose input is rotated at run time those whose ranges are measured as it is rotated.

    All of them with static scales, which come from the ranges. None with a scale per token: there ranges serve to
    smooth the input, which is rotated after that.
    """
    return rotated if scheme.is_static else {}


def check_finite(absmax: Mapping[str, Tensor], batch: int) -> None:
    """Raises SmoothQuantError naming the first layer, in running order, that was fed a NaN or an infinity."""
    flags = [channels.isfinite().all() for channels in absmax.values()]
    if not flags or bool(
        torch.stack([flag.to(flags[0].device) for flag in flags]).all()
    ):  # one wait for a GPU, not many
        return
    for name, channels in absmax.items():
        bad = (~torch.isfinite(channels)).nonzero().flatten().tolist()
        if bad:
            raise SmoothQuantError(
                f"the input of {name} is not finite in {len(bad)} of {channels.numel()} channels "
                f"(first: {bad[0]}) in calibration batch {batch}; the model overflows in its dtype or is damaged"
            )


def enough_windows(model: nn.Module, seqlen: int) -> int:
    """The number of windows of ``seqlen`` tokens that calibration needs: a few tokens for each channel of the widest
    input of a linear layer, within limits.
    """
    widest = max((weight_nk(linear).shape[1] for linear in find_linears(model).values()), default=0)
    return min(max(FEWEST_WINDOWS, math.ceil(TOKENS_PER_CHANNEL * widest / seqlen)), MOST_WINDOWS)


class CalibrationData:
    """Batches on their way into the model; some are held out to measure on, spread evenly where their number is known.

    What the user gives is converted, and cut to what is not padding, by ``Batches``.

    Attributes:
        first: the first batch, which is always held out.
        held_out: the held-out batches, by their number.
        last_is_held_out: whether the batch that was yielded last is one of them.
        windows: rows of all batches so far.
        tokens: tokens in them.

    Raises:
        SmoothQuantError: there is no batch.
    """

    def __init__(self, model: nn.Module, batches: Any) -> None:
        self._batches = Batches(model, batches, find_limits(model))
        self._rest = iter(self._batches)
        try:
            self.first: Batch = next(self._rest)
        except StopIteration:
            raise SmoothQuantError(NO_BATCH) from None
        self.held_out: dict[int, Batch] = {}
        self.windows = self.tokens = 0
        self.last_is_held_out = True

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        stride, wanted = HELD_OUT_SHARE, 1
        for index, batch in enumerate(itertools.chain([self.first], self._rest)):
            tokens = count_tokens(batch)
            self.windows += len(token_ids(batch))
            self.tokens += tokens
            if index == 0:
                wanted = max(1, HELD_OUT_TOKENS // max(1, tokens))
                stride = max(HELD_OUT_SHARE, operator.length_hint(self._batches) // wanted)
            if index % stride == 0 and len(self.held_out) < wanted:
                self.held_out[index] = batch
            self.last_is_held_out = index in self.held_out
            yield batch

    def is_held_out(self, index: int) -> bool:
        """Whether a batch that has been yielded is one to measure on."""
        return index in self.held_out


@dataclass(frozen=True)
class Calibration:
    """The results of calibration.

    Attributes:
        absmax: fp32 [K], largest magnitude of each channel of each layer's input, by the layer's name; smoothing
            updates it to the smoothed activations.
        recorder: the recorded calls of the blocks.
        held_out: which of the recorded windows choices are measured on.
        hidden: the ranges within experts; of no experts for no smoothing there.
    """

    absmax: dict[str, Tensor]
    recorder: BlockInputRecorder
    held_out: frozenset[int]
    hidden: HiddenRanges
