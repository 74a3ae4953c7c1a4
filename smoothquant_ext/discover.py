"""Finds the smoothing groups of a model by probing it, not by knowing its class.

A smoothing group is a producer (a norm or a linear layer) and the linear layers that consume its output channel by
channel, so that the producer's channel c may be divided by any s[c] > 0 if the consumers' columns are multiplied by it.
Whether a model contains such a pair is a property of its function, and it is tested as one:

1. The producer's output is replaced by noise, once as it is and then with every channel c scaled by 2**e[c]. Scaling
   by a power of two commutes with floating-point rounding, so an input channel j of a linear layer that carries
   producer channel c and nothing else comes back scaled by exactly 2**e[c]; anything that mixes channels, or is not
   homogeneous (GELU, the gate of a SwiGLU, the q and k of attention), does not. A few passes with different digits as
   exponents spell out c for every j: the channel map, GQA's repetition of heads included.
2. The scaled producer is run once more with the consumers' inputs scaled back. The block's output must then be what it
   was; a residual branch, a router or any other reader of the producer's output shows here and forbids the group.

Only one decoder block runs at a time, on a few tokens, so the cost is small beside calibration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import Batch, BlockCall, find_blocks, full_name, probe_batch, record_calls, tied_modules
from .linears import find_linears, is_linear, output_width, values_of, weight_nk

DIGIT_BASE = 16  # exponents are +-1 .. +-8: distinct, never 0 ("not this producer's"), far from fp16's limits
SMALLEST_CHUNK = 16  # a packed projection is split no finer than this when looking for its homogeneous part
MOST_CHUNKS = 96  # and tried in at most this many pieces


@dataclass(frozen=True)
class Group:
    """One smoothing group.

    Attributes:
        block: name of the decoder block that holds all its members.
        producer: model-wide name of the norm or linear layer whose output channels can be divided by s.
        kind: what the producer is.
        norm_offset: the norm scales by ``norm_offset + weight`` (0 for most, 1 for Gemma's); 0 for a linear.
        consumers: for each consuming linear layer, by model-wide name, an int64 tensor [K] that gives the producer
            channel behind each of its input channels, or -1 where there is none.
    """

    block: str
    producer: str
    kind: Literal["norm", "linear"]
    norm_offset: float
    consumers: Mapping[str, Tensor]


@dataclass
class Discovery:
    """What probing found.

    Attributes:
        groups: the smoothing groups, in the order in which their producers run.
        rejected: producers that feed linear layers but cannot be folded, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)


def discover(model: nn.Module, batch: Batch, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter) -> Discovery:
    """Probes every decoder block for smoothing groups.

    Args:
        model: any causal LM; its parameters are left as they are.
        batch: token ids [B, T] or forward arguments; only the first few tokens are used.
        progress: wraps the iterable of blocks, to show how far it is.
    """
    blocks = find_blocks(model)
    calls = record_calls(model, blocks, probe_batch(batch))
    tied = tied_modules(model)
    discovery = Discovery()
    hints: dict[tuple[type, str], Tensor | None] = {}
    for name in progress(list(calls)):
        prober = BlockProber(name, blocks[name], calls[name], tied, hints)
        prober.find_groups(discovery)
    return discovery


class BlockProber:
    """Probes one block: runs it again and again with one producer's output replaced."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        call: BlockCall,
        tied: set[str],
        hints: dict[tuple[type, str], Tensor | None],
    ) -> None:
        # In float16 underflow would hide factors; a copy of one 16-bit block in fp32 is small beside the model.
        is_wide = next(block.parameters()).dtype in (torch.float32, torch.float64)
        self.block = block if is_wide else copy.deepcopy(block).float()
        self.dtype = next(self.block.parameters()).dtype
        self.name, self.call, self.tied = name, call, tied
        self.hints = hints  # which channels of a packed producer were foldable in an earlier block of this class
        self.linears = find_linears(self.block)
        self.producers = self._producers_in_order()
        self.noise: dict[tuple[Any, ...], Tensor] = {}

    def find_groups(self, discovery: Discovery) -> None:
        """Appends this block's groups. A linear layer's input is smoothed once: the first producer gets it."""
        claimed: set[str] = set()
        for producer in self.producers:
            maps, reason = self._consumers_of(producer)
            if reason:
                discovery.rejected[full_name(self.name, producer)] = reason
            if not maps or claimed & maps.keys():
                continue
            claimed |= maps.keys()
            module = self.block.get_submodule(producer)
            discovery.groups.append(
                Group(
                    block=self.name,
                    producer=full_name(self.name, producer),
                    kind="linear" if is_linear(module) else "norm",
                    norm_offset=0.0 if is_linear(module) else norm_offset(module) or 0.0,
                    consumers={full_name(self.name, consumer): channels for consumer, channels in maps.items()},
                )
            )

    def _producers_in_order(self) -> list[str]:
        """Names of the norms and linear layers of the block that ran, in the order in which they ran."""
        seen: dict[str, None] = {}
        handles = []
        for name, module in self.block.named_modules():

            def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if is_linear(module) or (_looks_like_norm(module, args, output) and norm_offset(module) is not None):
                    seen.setdefault(name)

            handles.append(module.register_forward_hook(note))
        try:
            self.call.replay(self.block, self.dtype)
        finally:
            _remove(handles)
        return [name for name in seen if full_name(self.name, name) not in self.tied]

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
        used = torch.zeros(channels, dtype=torch.bool)
        for channel_map in maps.values():
            used[channel_map[channel_map >= 0]] = True
        exponents = torch.where(used, torch.arange(channels) % 3 + 1, 0)
        _, compensated = self._run(producer, exponents, undo=maps)
        if not all(_same(a, b) for a, b in zip(output, compensated, strict=True)):
            return {}, f"its output is also read by something other than {', '.join(maps)}"
        return maps, ""

    def _packed_maps(self, producer: str, channels: int, baseline: dict[str, Tensor]) -> dict[str, Tensor]:
        """For a producer wider than its consumer (packed qkv, packed gate and up): the part that is homogeneous."""
        hint_key = (type(self.block), producer)
        if hint_key in self.hints:
            hint = self.hints[hint_key]
            maps = {} if hint is None else self._channel_maps(producer, hint, baseline)
            if maps or hint is None:
                return maps
        found = torch.zeros(channels, dtype=torch.bool)
        widths = {weight_nk(linear).shape[1] for linear in self.linears.values()}
        for width in sorted(width for width in widths if width < channels):
            pieces = _chunks(0, channels, math.gcd(width, channels))
            tries = 0
            while pieces and tries < MOST_CHUNKS:
                start, stop = pieces.pop(0)
                mask = torch.zeros(channels, dtype=torch.bool)
                mask[start:stop] = True
                tries += 1
                if any(
                    weight_nk(self.linears[name]).shape[1] == width
                    for name in self._channel_maps(producer, mask, baseline)
                ):
                    found |= mask
                elif stop - start >= 2 * SMALLEST_CHUNK:
                    pieces += _chunks(start, stop, (stop - start + 1) // 2)
            if found.any():
                break
        self.hints[hint_key] = found if found.any() else None
        return self._channel_maps(producer, found, baseline) if found.any() else {}

    def _channel_maps(self, producer: str, mask: Tensor, baseline: dict[str, Tensor]) -> dict[str, Tensor]:
        """The linear layers whose every input channel scales by exactly one masked channel's factor, or stays."""
        channels = mask.numel()
        digits = max(1, math.ceil(math.log(channels, DIGIT_BASE)))
        maps: dict[str, Tensor] = {}
        for place in range(digits):
            digit = torch.arange(channels) // DIGIT_BASE**place % DIGIT_BASE
            exponents = torch.where(mask, torch.where(digit < 8, digit + 1, 7 - digit), 0)
            inputs, _ = self._run(producer, exponents)
            seen: dict[str, Tensor] = {}
            for name in baseline if place == 0 else maps:
                exponent = _exponents(baseline[name], inputs[name]) if name in inputs else None
                if exponent is not None and (place > 0 or bool((exponent != 0).any())):
                    seen[name] = exponent
            if place == 0:
                maps = {name: torch.zeros_like(exponent) for name, exponent in seen.items()}
            maps = {name: _append_digit(maps[name], exponent, place) for name, exponent in seen.items()}
            if not maps:
                break
        return {name: channel_map for name, channel_map in maps.items() if bool((channel_map < channels).all())}

    def _run(
        self, producer: str, exponents: Tensor, undo: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Runs the block with the producer's output replaced by noise * 2**exponents.

        Returns the inputs of all linear layers that run after the producer, [tokens, K] each, and the block's output.
        With ``undo`` the inputs of those layers are scaled back by the factors of their producer channels.
        """
        inputs: dict[str, Tensor] = {}
        factor = torch.exp2(exponents.double())
        started = False

        def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            nonlocal started
            started = True
            return self._noise_like(output) * factor.to(output)

        def observe(name: str, _module: nn.Module, args: Any) -> Any:
            if not started:
                return None
            x = args[0]
            if undo is not None and name in undo:
                gain = torch.where(undo[name] >= 0, factor[undo[name].clamp(min=0)], 1.0)
                return (x / gain.to(x), *args[1:])
            rows = x.detach().reshape(-1, x.shape[-1])
            inputs[name] = torch.cat([inputs[name], rows]) if name in inputs else rows
            return None

        handles = [self.block.get_submodule(producer).register_forward_hook(replace)]
        for name, linear in self.linears.items():
            handles.append(linear.register_forward_pre_hook(partial(observe, name)))
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


def norm_offset(norm: nn.Module) -> float | None:
    """How a norm uses its weight: 0.0 if it multiplies by ``weight``, 1.0 if by ``1 + weight``; ``None`` if neither.

    Found by running a copy of the norm with its weight set to 0, to 1 and to noise.
    """
    weight = values_of(norm, "weight")
    assert weight is not None
    size, device = weight.numel(), weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, size, generator=generator).to(device)
    fixed = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in norm.named_parameters(recurse=False)}

    def response(values: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = torch.func.functional_call(norm, {**fixed, "weight": values.to(device)}, (x,))
        return output.float()

    try:
        at_zero, at_one = response(torch.zeros(size)), response(torch.ones(size))
        slope = at_one - at_zero
        offset = float((at_zero / slope).median())
        noise = torch.randn(size, generator=generator)
        predicted = (round(offset) + noise.to(device)) * slope
        fits = torch.allclose(response(noise), predicted, rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError, ValueError):  # not callable on [rows, size] alone: no norm that could be folded
        return None
    return float(round(offset)) if fits and math.isfinite(offset) and round(offset) in (0, 1) else None


def _looks_like_norm(module: nn.Module, args: Any, output: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and not list(module.children())
        and isinstance(output, Tensor)
        and bool(args)
        and isinstance(args[0], Tensor)
        and args[0].shape == output.shape
        and output.shape[-1:] == weight.shape
        and {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}
    )


def _exponents(before: Tensor, after: Tensor) -> Tensor | None:
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


def _append_digit(channel_map: Tensor, exponent: Tensor, place: int) -> Tensor:
    """Adds what one pass says about each channel; exponent 0 means untouched, for good (-1)."""
    digit = torch.where(exponent > 0, exponent - 1, 7 - exponent)
    untouched = (exponent == 0) | (channel_map < 0)
    return torch.where(untouched, -1, channel_map + digit * DIGIT_BASE**place)


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
