"""Finds the smoothing groups of a model by probing it, not by knowing its class.

A smoothing group is a producer (a norm or a linear layer) and the linear layers that consume its output channel by
channel, so that the producer's channel c may be divided by any s[c] > 0 if the consumers' columns are multiplied by it.
Whether a model contains such a pair is a property of its function, and it is tested as one:

1. The producer's output is replaced by noise, once as it is and then with every channel c scaled by 2**e[c]. Scaling
   by a power of two commutes with floating-point rounding, so an input channel j of a linear layer that carries
   producer channel c and nothing else comes back scaled by exactly 2**e[c]; anything that mixes channels, or is not
   homogeneous (GELU, the gate of a SwiGLU, the q and k of attention), does not. A few passes with different digits as
   exponents spell out c for every j: the channel map, GQA's repetition of heads included. Of a packed projection only
   a part is like that: the values in packed qkv, one half of packed gate and up. It is found first, then scaled alone.
2. The scaled producer is run once more with the consumers' inputs scaled back. The block's output must then be what it
   was; a residual branch, a router or any other reader of the producer's output shows here and forbids the group.

Only one decoder block runs at a time, on a few tokens, so the cost is small beside calibration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import Batch, BlockCall, find_blocks, full_name, probe_batch, record_calls, tied_modules
from .channel_code import append_digit, digit_count, mapped_channels, read_exponents, spell
from .consumers import columns_of, find_readers
from .experts import Reading
from .linears import find_experts, find_linears, is_linear, output_width
from .norms import looks_like_norm, norm_offset

SMALLEST_CHUNK = 16  # a packed projection is split no finer than this when looking for its homogeneous part
MOST_CHUNKS = 96  # and tried in at most this many pieces


@dataclass(frozen=True)
class Group:
    """One smoothing group.

    Attributes:
        block: name of the decoder block that holds all its members.
        producer: model-wide name of the norm or linear layer whose output channels can be divided by s; empty where
            the input itself is divided (``explicit_groups``).
        kind: what the producer is.
        channels: C, how many channels its output has.
        norm_offset: the norm scales by ``norm_offset + weight`` (0 for most, 1 for Gemma's); 0 for a linear.
        consumers: for each consuming linear layer, by model-wide name, an int64 tensor [K] that gives the producer
            channel behind each of its input channels, or -1 where there is none. Routers and experts count as such.
        readings: how to read those consumers that are the experts of a mixture.
    """

    block: str
    producer: str
    kind: Literal["norm", "linear", "explicit"]
    channels: int
    norm_offset: float
    consumers: Mapping[str, Tensor]
    readings: Mapping[str, Reading] = field(default_factory=dict)


@dataclass
class Discovery:
    """What probing found.

    Attributes:
        groups: the smoothing groups, in the order in which their producers run.
        rejected: producers that feed linear layers but cannot be folded, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)


def discover(
    model: nn.Module,
    batch: Batch,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    running: Collection[str] = (),
    readings: Mapping[str, Reading] | None = None,
) -> Discovery:
    """Probes every decoder block for smoothing groups.

    Args:
        model: any causal LM; its parameters are left as they are.
        batch: token ids [B, T] or forward arguments; only the first few tokens are used.
        progress: wraps the iterable of blocks, to show how far it is.
        running: layers that are known to run. Where one of them does not on the few tokens (an expert), norms of its
            block are left alone: it may read them.
        readings: how to read the experts of mixtures, by name; ``None`` to find out.
    """
    if readings is None:
        readings = {name: reading for name, reading in find_experts(model).items() if reading is not None}
    blocks = find_blocks(model)
    calls = record_calls(model, blocks, probe_batch(batch))
    tied = tied_modules(model)
    discovery = Discovery()
    hints: dict[tuple[type, str, int], Tensor | None] = {}
    for name in progress(list(calls)):
        prefix = full_name(name, "")
        own = {each.removeprefix(prefix): reading for each, reading in readings.items() if each.startswith(prefix)}
        prober = BlockProber(name, blocks[name], calls[name], tied, hints, running, own)
        prober.find_groups(discovery)
    return discovery


def explicit_groups(block: str, inputs: Iterable[Iterable[str]], widths: Mapping[str, int]) -> list[Group]:
    """Groups without a producer, one for each input of a block's linear layers: the input itself is divided by s.

    Args:
        block: the block's name.
        inputs: for each input the model-wide names of the layers that read it.
        widths: K of each layer.
    """
    groups = []
    for readers in map(list, inputs):
        width = widths[readers[0]]
        channels = {name: torch.arange(width) for name in readers}
        groups.append(Group(block, "", "explicit", width, 0.0, channels))
    return groups


class BlockProber:
    """Probes one block: runs it again and again with one producer's output replaced."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        call: BlockCall,
        tied: set[str],
        hints: dict[tuple[type, str, int], Tensor | None],
        running: Collection[str] = (),
        readings: Mapping[str, Reading] = MappingProxyType({}),
    ) -> None:
        # In float16 underflow would hide factors; a copy of one 16-bit block in fp32 is small beside the model.
        is_wide = next(block.parameters()).dtype in (torch.float32, torch.float64)
        self.block = block if is_wide else copy.deepcopy(block).float()
        self.dtype = next(self.block.parameters()).dtype
        self.name, self.call, self.tied = name, call, tied
        self.hints = hints  # which channels of a packed producer were foldable in an earlier block of this class
        self.readings = readings
        self.readers = find_readers(self.block, readings)
        self.widths = {
            local: columns_of(module, readings.get(local))[0].shape[1] for local, module in self.readers.items()
        }
        self.unseen = {local for local in find_linears(self.block) if full_name(name, local) in running}
        self.producers = self._producers_in_order()
        self.noise: dict[tuple[Any, ...], Tensor] = {}

    def find_groups(self, discovery: Discovery) -> None:
        """Appends this block's groups. A linear layer's input is smoothed once: the first producer gets it."""
        claimed: set[str] = set()
        for producer, offset in self.producers.items():
            maps, reason = self._consumers_of(producer)
            if reason:
                discovery.rejected[full_name(self.name, producer)] = reason
            if not maps or claimed & maps.keys():
                continue
            claimed |= maps.keys()
            discovery.groups.append(
                Group(
                    block=self.name,
                    producer=full_name(self.name, producer),
                    kind="linear" if is_linear(self.block.get_submodule(producer)) else "norm",
                    channels=output_width(self.block.get_submodule(producer)),
                    norm_offset=offset,
                    consumers={full_name(self.name, consumer): channels for consumer, channels in maps.items()},
                    readings={
                        full_name(self.name, each): self.readings[each] for each in maps if each in self.readings
                    },
                )
            )

    def _producers_in_order(self) -> dict[str, float]:
        """The norms and linear layers of the block that ran, in the order in which they ran, with their norm offset."""
        seen: dict[str, float] = {}
        handles = []
        for name, module in self.block.named_modules():

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if name in seen:
                    return
                if is_linear(module):
                    seen[name] = 0.0
                    if output.numel():
                        self.unseen.discard(name)
                elif looks_like_norm(module, args, output) and (offset := norm_offset(module, *args)) is not None:
                    seen[name] = offset

            handles.append(module.register_forward_hook(note))
        try:
            self.call.replay(self.block, self.dtype)
        finally:
            _remove(handles)
        return {name: offset for name, offset in seen.items() if full_name(self.name, name) not in self.tied}

    def _consumers_of(self, producer: str) -> tuple[dict[str, Tensor], str]:
        """Channel maps of the linear layers that can undo a scaling of ``producer``; or why these cannot."""
        module = self.block.get_submodule(producer)
        channels = output_width(module)
        baseline, output = self._run(producer, torch.zeros(channels, dtype=torch.int64))
        everything = torch.ones(channels, dtype=torch.bool)
        maps = self._channel_maps(producer, everything, baseline)
        if not maps and is_linear(module):
            maps = self._packed_maps(producer, channels, baseline)
        if not maps:
            return {}, ""
        if any(full_name(self.name, consumer) in self.tied for consumer in maps):
            return {}, "a consumer shares its weight with another layer"
        if self.unseen and not is_linear(module):
            return {}, f"{min(self.unseen)} did not run while probing, and may read it too"
        exponents = torch.where(mapped_channels(maps, channels), torch.arange(channels) % 3 + 1, 0)
        _, compensated = self._run(producer, exponents, undo=maps)
        if not all(_same(a, b) for a, b in zip(output, compensated, strict=True)):
            return {}, f"its output is also read by something other than {', '.join(maps)}"
        return maps, ""

    def _packed_maps(self, producer: str, channels: int, baseline: dict[str, Tensor]) -> dict[str, Tensor]:
        """For a producer wider than its consumer (packed qkv, packed gate and up): the part that is homogeneous."""
        hint_key = (type(self.block), producer, channels)
        if hint_key in self.hints:
            hint = self.hints[hint_key]
            maps = {} if hint is None else self._channel_maps(producer, hint, baseline)
            if maps or hint is None:
                return maps
        for find_candidates in (self._averaged_channels, self._homogeneous_chunks):
            found = find_candidates(producer, channels, baseline)
            if found.any() and (maps := self._channel_maps(producer, found, baseline)):
                self.hints[hint_key] = found
                return maps
        self.hints[hint_key] = None
        return {}

    def _averaged_channels(self, producer: str, channels: int, _baseline: dict[str, Tensor]) -> Tensor:
        """The channels that attention averages over tokens, however many heads they are spread over.

        With noise that is alike for all tokens every average is the value itself, whatever q and k are.
        """
        baseline, _ = self._run(producer, torch.zeros(channels, dtype=torch.int64), alike=True)
        everything = torch.ones(channels, dtype=torch.bool)
        return mapped_channels(self._channel_maps(producer, everything, baseline, alike=True), channels)

    def _homogeneous_chunks(self, producer: str, channels: int, baseline: dict[str, Tensor]) -> Tensor:
        """The channels of those pieces of the producer, cut ever finer, that pass by themselves.

        Where several are multiplied with each other, each passes; all of them together do not, so the first is taken.
        """
        found = torch.zeros(channels, dtype=torch.bool)
        reached: dict[str, Tensor] = {}
        for width in sorted(width for width in set(self.widths.values()) if width < channels):
            pieces = _chunks(0, channels, math.gcd(width, channels))
            tries = 0
            while pieces and tries < MOST_CHUNKS:
                start, stop = pieces.pop(0)
                mask = torch.zeros(channels, dtype=torch.bool)
                mask[start:stop] = True
                tries += 1
                inputs = {
                    name: channel_map >= 0
                    for name, channel_map in self._channel_maps(producer, mask, baseline).items()
                    if self.widths[name] == width
                }
                if inputs and not any(bool((reached[name] & inputs[name]).any()) for name in reached.keys() & inputs):
                    found |= mask
                    reached |= {name: mapped | reached.get(name, mapped) for name, mapped in inputs.items()}
                elif not inputs and stop - start >= 2 * SMALLEST_CHUNK:
                    pieces += _chunks(start, stop, (stop - start + 1) // 2)
            if found.any():
                break
        return found

    def _channel_maps(
        self, producer: str, mask: Tensor, baseline: dict[str, Tensor], alike: bool = False
    ) -> dict[str, Tensor]:
        """The linear layers whose every input channel scales by exactly one masked channel's factor, or stays."""
        channels = mask.numel()
        maps: dict[str, Tensor] = {}
        for place in range(digit_count(channels)):
            exponents = torch.where(mask, spell(channels, place), 0)
            inputs, _ = self._run(producer, exponents, alike=alike)
            seen: dict[str, Tensor] = {}
            for name in baseline if place == 0 else maps:
                exponent = read_exponents(baseline[name], inputs[name]) if name in inputs else None
                if exponent is not None and (place > 0 or bool((exponent != 0).any())):
                    seen[name] = exponent
            if place == 0:
                maps = {name: torch.zeros_like(exponent) for name, exponent in seen.items()}
            maps = {name: append_digit(maps[name], exponent, place) for name, exponent in seen.items()}
            if not maps:
                break
        maps = {name: channel_map for name, channel_map in maps.items() if bool((channel_map < channels).all())}
        if maps:  # a product of channels spells a channel as well, but does not scale as that channel does
            exponents = torch.where(mask, torch.arange(channels) * 5 % 7 + 1, 0)
            inputs, _ = self._run(producer, exponents, alike=alike)
            for name, channel_map in list(maps.items()):
                expected = torch.where(channel_map >= 0, exponents[channel_map.clamp(min=0)], 0)
                exponent = read_exponents(baseline[name], inputs[name])
                if exponent is None or not torch.equal(exponent, expected):
                    del maps[name]
        return maps

    def _run(
        self, producer: str, exponents: Tensor, undo: Mapping[str, Tensor] | None = None, alike: bool = False
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Runs the block with the producer's output replaced by noise * 2**exponents.

        Returns the inputs of all linear layers that run after the producer, [tokens, K] each, and the block's output.
        With ``undo`` the inputs of those layers are scaled back by the factors of their producer channels.
        With ``alike`` all tokens get the same noise.
        """
        inputs: dict[str, Tensor] = {}
        factor = torch.exp2(exponents.double())
        started = False

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            nonlocal started
            started = True
            noise = self._noise_like(output)
            if alike and noise.numel():
                noise = noise.flatten(0, -2)[0].expand_as(noise)
            return noise * factor.to(output)

        def observe(name: str, _module: nn.Module, args: Any) -> Any:
            if not started or not args or (x := args[0]).numel() == 0:  # an expert may be given no token
                return None
            if undo is not None and name in undo:
                gain = torch.where(undo[name] >= 0, factor[undo[name].clamp(min=0)], 1.0)
                return (x / gain.to(x), *args[1:])
            rows = x.detach().reshape(-1, x.shape[-1])
            inputs[name] = torch.cat([inputs[name], rows]) if name in inputs else rows
            return None

        handles = [self.block.get_submodule(producer).register_forward_hook(replace)]
        for name, reader in self.readers.items():
            handles.append(reader.register_forward_pre_hook(partial(observe, name)))
        try:
            output = self.call.replay(self.block, self.dtype)
        finally:
            _remove(handles)
        inputs.pop(producer, None)
        return inputs, output

    def _noise_like(self, output: Tensor) -> Tensor:
        key = (output.shape, output.dtype, output.device)
        if key not in self.noise:
            generator = torch.Generator().manual_seed(0)
            self.noise[key] = torch.randn(output.shape, generator=generator).to(output)
        return self.noise[key]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal within the rounding of a few operations in the tensors' own dtype, over the whole tensor's magnitude."""
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    bound = 4 * torch.finfo(a.dtype).eps * float(a.double().norm())
    return float((a.double() - b.double()).norm()) <= bound  # False for a NaN


def _chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
