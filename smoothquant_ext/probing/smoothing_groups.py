"""Finds the smoothing groups of a model by probing it, not by knowing its class.

A smoothing group is a producer (a norm or a linear layer) and the linear layers that consume its output channel by
channel, so that the producer's channel c may be divided by any s[c] > 0 if the consumers' columns are multiplied by it.
Whether a model contains such a pair is a property of its function, and it is tested as one:

1. The producer's output is replaced by noise, once as it is and then with every channel c scaled by 2**e[c]. Scaling
   by a power of two commutes with floating-point rounding, so an input channel j of a linear layer that carries
   producer channel c and nothing else comes back scaled by exactly 2**e[c]; anything that mixes channels, or is not
   homogeneous (GELU, the gate of a SwiGLU, the q and k of attention), does not. A few passes with different digits as
   exponents spell out c for every j: the channel map, GQA's repetition of heads included. Of a packed projection only
   a part is like that: the values in packed qkv, one half of packed gate and up. That part is searched for first, then
   scaled alone.
2. The scaled producer is run once more with the consumers' inputs scaled back. The block's output must then be what it
   was; a residual branch, or anything else that uses the producer's output, shows here and forbids the group.

Only one decoder block runs at a time, on a few tokens, so the cost is small beside calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .channel_code import append_digit, digit_count, mapped_channels, read_exponents, spell
from .consumers import columns_of
from .copies import copy_of, raised_
from .experts import ExpertsLayout
from .hooks import hooked
from .linears import output_width
from .norms import looks_like_norm, norm_offset
from .numerics import relative_error
from .structure import Block, Structure
from .trying import Failed, attempt
from .values import first_argument, with_first_argument

SMALLEST_CHUNK = 16  # a packed projection is split no finer than this when looking for its homogeneous part
MOST_CHUNKS = 96  # and tried in at most this many pieces
# Between the block's output and the compensated one: the scaled noise, the consumer's input, its product and the sum
# with the residual.
COMPENSATED_ROUNDINGS = 4


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
        layouts: of those consumers that are the experts of a mixture.
    """

    block: str
    producer: str
    kind: Literal["norm", "linear", "explicit"]
    channels: int
    norm_offset: float
    consumers: Mapping[str, Tensor]
    layouts: Mapping[str, ExpertsLayout] = field(default_factory=dict)


@dataclass
class Discovery:
    """The smoothing groups of a model.

    Attributes:
        groups: the smoothing groups, in the order in which their producers run.
        rejected: producers that feed linear layers but cannot be folded, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)


def discover(
    structure: Structure,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    running: Collection[str] = (),
) -> Discovery:
    """Probes every decoder block for smoothing groups.

    Args:
        structure: of any model; its parameters are left as they are.
        progress: wraps the iterable of blocks, to show how far it is.
        running: layers that are known to run. Where one of them does not run on the probe batch (an expert), the norms
            of its block are left alone: it may consume their output.
    """
    discovery = Discovery()
    hints: dict[tuple[type, str, int], Tensor | None] = {}
    for name in progress(structure.called):

        def probe(name: str = name) -> None:
            BlockProber(structure.blocks[name], structure.tied, hints, running).find_groups(discovery)

        outcome = attempt(probe)
        if isinstance(outcome, Failed):
            discovery.rejected[name or "the model"] = f"it fails when it runs alone ({outcome.reason})"
    return discovery


def explicit_groups(block: str, inputs: Iterable[Iterable[str]], widths: Mapping[str, int]) -> list[Group]:
    """Groups without a producer, one for each input of a block's linear layers: the input itself is divided by s.

    Args:
        block: the block's name.
        inputs: for each input the model-wide names of the layers that consume it.
        widths: K of each layer.
    """
    groups = []
    for consumers in map(list, inputs):
        width = widths[consumers[0]]
        channels = {name: torch.arange(width) for name in consumers}
        groups.append(Group(block, "", "explicit", width, 0.0, channels))
    return groups


class BlockProber:
    """Probes one block: runs it again and again with one producer's output replaced."""

    def __init__(
        self,
        block: Block,
        tied: Collection[str],
        hints: dict[tuple[type, str, int], Tensor | None],
        running: Collection[str] = (),
    ) -> None:
        """Prepares the probing of a block that the probe batch ran.

        Args:
            block: the block.
            tied: model-wide names of modules that share parameters.
            hints: which channels of a packed producer were foldable in an earlier block of this class; updated.
            running: model-wide names of layers that are known to run.
        """
        assert block.call is not None
        self.block, self.call, self.tied, self.hints = block, block.call, tied, hints
        # A copy, which is small beside the model: a block may keep what it computes, count its calls and so on. In
        # float16 underflow would hide factors.
        dtypes = {each.dtype for each in block.module.parameters() if each.is_floating_point()}
        self.dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
        self.module = raised_(copy_of(block.module), self.dtype)
        self.consumers = {local: self.module.get_submodule(local) for local in block.consumers}
        self.widths = {
            local: columns_of(module, block.experts.get(local))[0].shape[1] for local, module in self.consumers.items()
        }
        self.idle = {local for local in block.linears if block.full_name(local) in running}
        self.producers = self._producers_in_order()
        self.noise: dict[tuple[Any, ...], Tensor] = {}

    def find_groups(self, discovery: Discovery, kinds: Collection[str] = ("norm", "linear")) -> None:
        """Appends this block's groups of these kinds. A layer's input is smoothed once: by its first producer."""
        full_name, layouts = self.block.full_name, self.block.experts
        claimed: set[str] = set()
        for producer, offset in self.producers.items():
            if ("linear" if producer in self.block.linears else "norm") not in kinds:
                continue

            def probe(producer: str = producer) -> tuple[dict[str, Tensor], str]:
                return self._consumers_of(producer)

            outcome = attempt(probe)
            if isinstance(outcome, Failed):
                outcome = {}, f"its block fails when its output is replaced by noise ({outcome.reason})"
            maps, reason = outcome
            if reason:
                discovery.rejected[full_name(producer)] = reason
            if not maps or claimed & maps.keys():
                continue
            claimed |= maps.keys()
            discovery.groups.append(
                Group(
                    block=self.block.name,
                    producer=full_name(producer),
                    kind="linear" if producer in self.block.linears else "norm",
                    channels=output_width(self.module.get_submodule(producer)),
                    norm_offset=offset,
                    consumers={full_name(consumer): channels for consumer, channels in maps.items()},
                    layouts={full_name(consumer): layouts[consumer] for consumer in maps if consumer in layouts},
                )
            )

    def _producers_in_order(self) -> dict[str, float]:
        """The norms and linear layers of the block that ran, in the order in which they ran, with their norm offset.

        Takes the linear layers that ran out of ``idle``.
        """
        offsets: dict[str, float] = {}
        modules = dict(self.module.named_modules())

        def note(name: str, args: Any, kwargs: Any, output: Any) -> None:
            if name in offsets:
                return
            args = args or tuple(kwargs.values())
            if name in self.block.linears:
                offsets[name] = 0.0
                if output.numel():
                    self.idle.discard(name)
            elif looks_like_norm(modules[name], args, output):
                offset = norm_offset(modules[name], *args)
                if offset is not None:
                    offsets[name] = offset

        with hooked(modules, after=note):
            self.call.replay(self.module, self.dtype)
        return offsets

    def _consumers_of(self, producer: str) -> tuple[dict[str, Tensor], str]:
        """Channel maps of the linear layers that can undo a scaling of ``producer``; or why these cannot."""
        is_linear = producer in self.block.linears
        channels = output_width(self.module.get_submodule(producer))
        baseline, output = self._run(producer, torch.zeros(channels, dtype=torch.int64))
        everything = torch.ones(channels, dtype=torch.bool)
        maps = self._channel_maps(producer, everything, baseline)
        if not maps and is_linear:
            maps = self._packed_maps(producer, channels, baseline)
        if not maps:
            return {}, ""
        if self.block.full_name(producer) in self.tied:
            return {}, "its weight is used under another name too"
        if any(self.block.full_name(consumer) in self.tied for consumer in maps):
            return {}, "a consumer shares its weight with another layer"
        if any(_is_computed(self.module.get_submodule(member)) for member in (producer, *maps)):
            return {}, "its weight, or a consumer's, is computed from other parameters"
        if not output:
            return {}, "its block returns no tensor to compare"
        if self.idle and not is_linear:
            return {}, f"{min(self.idle)} did not run while probing, and may read it too"
        exponents = torch.where(mapped_channels(maps, channels), torch.arange(channels) % 3 + 1, 0)
        _, compensated = self._run(producer, exponents, undo=maps)
        if not all(_is_same(a, b) for a, b in zip(compensated, output, strict=True)):
            return {}, f"its output is also read by something other than {', '.join(maps)}"
        return maps, ""

    def _packed_maps(self, producer: str, channels: int, baseline: dict[str, Tensor]) -> dict[str, Tensor]:
        """For a producer wider than its consumer (packed qkv, packed gate and up): the part that is homogeneous."""
        hint_key = (type(self.module), producer, channels)
        if hint_key in self.hints:
            hint = self.hints[hint_key]
            maps = {} if hint is None else self._channel_maps(producer, hint, baseline)
            if maps or hint is None:
                return maps
        for find_candidates in (self._averaged_channels, self._homogeneous_chunks):
            candidates = find_candidates(producer, channels, baseline)
            if candidates.any() and (maps := self._channel_maps(producer, candidates, baseline)):
                self.hints[hint_key] = candidates
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
        passing = torch.zeros(channels, dtype=torch.bool)
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
                    passing |= mask
                    reached |= {name: mapped | reached.get(name, mapped) for name, mapped in inputs.items()}
                elif not inputs and stop - start >= 2 * SMALLEST_CHUNK:
                    pieces += _chunks(start, stop, (stop - start + 1) // 2)
            if passing.any():
                break
        return passing

    def _channel_maps(
        self, producer: str, mask: Tensor, baseline: dict[str, Tensor], alike: bool = False
    ) -> dict[str, Tensor]:
        """The linear layers whose every input channel scales by exactly one masked channel's factor, or stays."""
        channels = mask.numel()
        maps: dict[str, Tensor] = {}
        for place in range(digit_count(channels)):
            exponents = torch.where(mask, spell(channels, place), 0)
            inputs, _ = self._run(producer, exponents, alike=alike)
            digits: dict[str, Tensor] = {}
            for name in baseline if place == 0 else maps:
                exponent = read_exponents(baseline[name], inputs[name]) if name in inputs else None
                if exponent is not None and (place > 0 or bool((exponent != 0).any())):
                    digits[name] = exponent
            if place == 0:
                maps = {name: torch.zeros_like(exponent) for name, exponent in digits.items()}
            maps = {name: append_digit(maps[name], exponent, place) for name, exponent in digits.items()}
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

        def replace(_name: str, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
            nonlocal started
            started = True
            noise = self._noise_like(output)
            if alike and noise.numel():
                noise = noise.flatten(0, -2)[0].expand_as(noise)
            return noise * factor.to(output)

        def take_input(name: str, args: Any, kwargs: Any) -> Any:
            x = first_argument(args, kwargs)
            if not started or x is None or x.numel() == 0:  # an expert may be given no token
                return None
            if undo is not None and name in undo:
                gain = torch.where(undo[name] >= 0, factor[undo[name].clamp(min=0)], 1.0)
                return with_first_argument(args, kwargs, x / gain.to(x))
            rows = x.detach().reshape(-1, x.shape[-1])
            inputs[name] = torch.cat([inputs[name], rows]) if name in inputs else rows
            return None

        replaced = {producer: self.module.get_submodule(producer)}
        with hooked(replaced, after=replace), hooked(self.consumers, before=take_input):
            output = self.call.replay(self.module, self.dtype)
        inputs.pop(producer, None)
        return inputs, output

    def _noise_like(self, output: Tensor) -> Tensor:
        key = (output.shape, output.dtype, output.device)
        if key not in self.noise:
            generator = torch.Generator().manual_seed(0)
            self.noise[key] = torch.randn(output.shape, generator=generator).to(output)
        return self.noise[key]


def _is_same(actual: Tensor, expected: Tensor) -> bool:
    eps = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    return relative_error(actual, expected) <= COMPENSATED_ROUNDINGS * eps


def _is_computed(module: nn.Module) -> bool:
    """Whether the weight is made anew for every call, as parametrizations do: a change of it would be lost."""
    return isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters


def _chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]
