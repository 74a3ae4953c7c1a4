"""Calibration: the largest magnitude that each input channel of each linear layer takes on real data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from ..probing.blocks import Batch, run_model, token_ids
from ..probing.experts import Reading
from .block_inputs import StreamRecorder
from .expert_smoothing import HiddenRanges


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    recorder: StreamRecorder | None = None,
    records: Callable[[int], bool] = lambda _: True,
    hidden: HiddenRanges | None = None,
    experts: Mapping[str, Reading] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Runs the model over the batches and keeps a running absmax per input channel: O(features) memory.

    Args:
        model: the causal LM, in floating point.
        layers: the linear layers, and experts of mixtures, to watch, by name.
        batches: token ids [B, T] or forward arguments; any iterable, consumed once.
        recorder: also records what the blocks are called with, in the batches for whose number ``records`` is true.
        hidden: also looks within the ``experts``.
        experts: how these are to be read, by name.

    Returns:
        fp32 absmax [K] for each layer that ran, in the order in which the layers ran.

    Raises:
        SmoothQuantError: there is no batch, or a layer received a NaN or an infinity.
    """
    absmax: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def watch(_module: nn.Module, args: Any, name: str = name) -> None:
            if not args or args[0].numel() == 0:  # an expert may be given no token
                return
            x = args[0].detach()
            seen = x.reshape(-1, x.shape[-1]).abs().amax(dim=0).float()
            absmax[name] = torch.maximum(absmax[name], seen) if name in absmax else seen

        handles.append(layer.register_forward_pre_hook(watch))
    if hidden is not None:
        handles += [hidden.watch(name, layers[name], reading) for name, reading in experts.items()]
    count = 0
    try:
        for batch in batches:
            with recorder if recorder is not None and records(count) else nullcontext():
                run_model(model, batch)
            count += 1
            check_finite(absmax, count)
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise SmoothQuantError("there is no calibration batch; pass at least one batch of token ids [B, T]")
    return absmax


def check_finite(absmax: Mapping[str, Tensor], batch: int) -> None:
    """Raises SmoothQuantError naming the first layer, in running order, that was fed a NaN or an infinity."""
    for name, channels in absmax.items():
        bad = (~torch.isfinite(channels)).nonzero().flatten().tolist()
        if bad:
            raise SmoothQuantError(
                f"the input of {name} is not finite in {len(bad)} of {channels.numel()} channels "
                f"(first: {bad[0]}) in calibration batch {batch}; the model overflows in its dtype or is damaged"
            )


HELD_OUT_SHARE = 4  # every fourth batch at most
HELD_OUT_TOKENS = 2048  # are enough to measure choices on


class CalibrationData:
    """Batches on their way into the model; some are kept to measure on, spread evenly where their number is known.

    Attributes:
        held_out: the batches that are kept, by their number.
        windows: rows of all batches so far.
        tokens: tokens in them.
    """

    def __init__(self, batches: Tensor | Iterable[Batch]) -> None:
        self._batches = batches.split(1) if isinstance(batches, Tensor) and len(batches) else batches
        self.held_out: dict[int, Batch] = {}
        self.windows = self.tokens = 0

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a TypeError is how an iterator says that it has none

    def __iter__(self) -> Iterator[Batch]:
        stride, wanted = HELD_OUT_SHARE, 1
        for index, batch in enumerate(self._batches):
            rows, length = token_ids(batch).shape[:2]
            self.windows += rows
            self.tokens += rows * length
            if index == 0:
                tokens = rows * length
                wanted = max(1, HELD_OUT_TOKENS // max(1, tokens))
                stride = max(HELD_OUT_SHARE, operator.length_hint(self._batches) // wanted)
            if index % stride == 0 and len(self.held_out) < wanted:
                self.held_out[index] = batch
            yield batch
        if not self.held_out:
            raise SmoothQuantError("there is no calibration batch; pass at least one batch of token ids [B, T]")

    def is_held_out(self, index: int) -> bool:
        """Whether a batch that has been yielded is one to measure on."""
        return index in self.held_out

    @property
    def first(self) -> Batch:
        """The first batch, which is always held out."""
        return self.held_out[0]
