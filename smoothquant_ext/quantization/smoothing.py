"""Smoothing: chooses s for each group, proves that the fold preserves the function, and folds it into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..probing.blocks import BlockCall
from ..probing.consumers import columns_of
from ..probing.copies import copy_of, raised_
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.numerics import outlier_ratio, relative_error
from ..probing.smoothing_groups import Group
from ..probing.structure import Block
from ..probing.trying import Failed, attempt
from ..scheme import Scheme
from .report import SmoothedGroup

# The proof runs in a raised dtype, but norms, rotary embeddings and softmax of most models compute in fp32 whatever
# their input: two runs of the same function may differ by a few dozen fp32 roundings.
PROOF_TOLERANCE = 64 * torch.finfo(torch.float32).eps


def smoothing_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, Xiao et al. 2022, eq. 4).

    Args:
        x_absmax: fp32 [C], calibrated absmax of each channel of the consumers' input.
        w_absmax: fp32 [C], absmax of the consumers' weight columns for that channel (see ``column_absmax``).
        alpha: migration strength in [0, 1].

    Returns:
        fp32 [C], finite and positive; 1 where a channel is dead in the activations or in the weights.
    """
    s = x_absmax.float() ** alpha / w_absmax.float() ** (1.0 - alpha)
    usable = torch.isfinite(s) & (s > 0) & (x_absmax > 0) & (w_absmax > 0)
    return torch.where(usable, s, 1.0)


def column_absmax(weight: Tensor, scheme: Scheme) -> Tensor:
    """fp32 [K]: the size of each column of a weight [N, K], relative to the scale that quantizes it.

    With one scale per output channel a column costs precision in the rows where it is large beside the rest of the
    row, so rows are first divided by their absmax. With one scale for the tensor it is the plain absmax of eq. 4. On
    SmolLM2-135M (INT8 dynamic, alpha 0.5, 8k tokens) this takes the KL divergence from fp32 from 0.0106 to 0.0077.
    """
    magnitude = weight.abs().float()
    if scheme.weight == "channel":
        magnitude /= magnitude.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return magnitude.amax(dim=0)


@dataclass(frozen=True)
class Magnitudes:
    """fp32 [C] each, over a group's producer channels: absmax of its consumers' input and of their weight columns."""

    x: Tensor
    w: Tensor

    def scale(self, alpha: float) -> Tensor:
        """``smoothing_scale`` of these."""
        return smoothing_scale(self.x, self.w, alpha)


def magnitudes(
    group: Group, consumers: Mapping[str, nn.Module], absmax: Mapping[str, Tensor], scheme: Scheme
) -> Magnitudes:
    """The magnitudes that a group's scale is computed from, over those of its consumers that will be quantized."""
    channels = group.channels
    x, w = torch.zeros(channels), torch.zeros(channels)
    for name, module in consumers.items():
        if name in absmax:
            _scatter_max_(x, group.consumers[name], absmax[name].cpu())
            for weight in columns_of(module, group.layouts.get(name)):
                _scatter_max_(w, group.consumers[name], column_absmax(weight, scheme).cpu())
    return Magnitudes(x, w)


def by_block(groups: Iterable[Group], absmax: Mapping[str, Tensor]) -> dict[str, list[Group]]:
    """The groups that feed a layer to be quantized, by block, in the order in which they are folded.

    Folding v -> o changes the rows of v, by which the norm's scale is chosen: linear producers go first.
    """
    members: dict[str, list[Group]] = {}
    for group in groups:
        if any(name in absmax for name in group.consumers):
            members.setdefault(group.block, []).append(group)
    return {block: sorted(fed, key=lambda group: group.kind != "linear") for block, fed in members.items()}


class Proof:
    """A copy of one block in a raised dtype, on which folds are tried before they reach the model.

    Attributes:
        block: the original.
        module: the copy.
        dtype: of the copy: fp64 for fp32, fp32 for 16 bits.
    """

    def __init__(self, block: Block, call: BlockCall | None = None) -> None:
        """Copies a block; ``call`` is what the copy is run with, the block's call on the probe batch by default."""
        self.block = block
        call = call or block.call
        assert call is not None
        self._call = call
        self._expected: list[Tensor] = []
        self._failure = ""
        dtype = next(parameter.dtype for parameter in block.module.parameters() if parameter.is_floating_point())
        # Some kernels (grouped products of experts) have no fp64.
        for raised in (torch.float64, torch.float32) if dtype == torch.float32 else (torch.float32,):
            outcome = attempt(partial(self._raise_to, raised))
            if not isinstance(outcome, Failed):
                self._failure = "" if self._expected else "its block returns no tensor to compare"
                break
            self._failure = f"its block fails in {str(raised).removeprefix('torch.')} ({outcome.reason})"

    def _raise_to(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.module = raised_(copy_of(self.block.module), dtype)
        self._expected = self._run()

    def try_fold(self, group: Group, s: Tensor) -> str:
        """Folds the copy; if its output changes, undoes that and returns by how much, else returns ''."""
        producer, consumers = group_modules(self.block, group, self.module)
        modules = [module for module in (producer, *consumers.values()) if module is not None]
        return self.attempt(modules, lambda: fold_(producer, consumers, group, s))

    def attempt(self, modules: Iterable[nn.Module], change: Callable[[], object]) -> str:
        """Changes parameters of the copy's ``modules``; as ``try_fold``."""
        if self._failure:
            return self._failure
        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        before = {parameter: parameter.detach().clone() for parameter in parameters}
        error = attempt(partial(self._error_after, change))
        if not isinstance(error, Failed) and error <= PROOF_TOLERANCE:
            return ""
        for parameter, value in before.items():
            parameter.data.copy_(value)
        if isinstance(error, Failed):
            return f"its block fails when it is folded ({error.reason}), so it was undone"
        return f"folding it changes the block's output by {error:.1e} (relative), so it was undone"

    def _error_after(self, change: Callable[[], object]) -> float:
        change()
        return max(relative_error(actual, want) for actual, want in zip(self._run(), self._expected, strict=True))

    def _run(self) -> list[Tensor]:
        return self._call.replay(self.module, self.dtype)


def fold_(producer: nn.Module | None, consumers: Mapping[str, nn.Module], group: Group, s: Tensor) -> Tensor:
    """Divides the producer's output channels by s [C] and multiplies the consumers' columns by it, in place.

    Without a producer the columns alone are multiplied. A norm's weight is rounded to its dtype, and in 16 bits that
    changes a whole channel: the consumers are multiplied by what the norm was really divided by.

    Returns:
        What the consumers were multiplied by: s, or what came of it.
    """
    if producer is None:
        pass
    elif is_linear(producer):
        rows = weight_nk(as_linear(producer))
        rows.copy_(_wide(rows) / s.to(rows.device)[:, None])
    else:
        weight = values_of(producer, "weight")
        assert weight is not None
        before = _wide(weight) + group.norm_offset
        weight.copy_(before / s.to(weight.device) - group.norm_offset)
        divided_by = (before / (_wide(weight) + group.norm_offset)).to(s)
        s = torch.where(torch.isfinite(divided_by) & (divided_by > 0), divided_by, s)
    bias = None if producer is None else values_of(producer, "bias")
    if bias is not None:
        bias.copy_(_wide(bias) / s.to(bias.device))
    for name, module in consumers.items():
        for columns in columns_of(module, group.layouts.get(name)):
            columns.copy_(_wide(columns) * gather_scale(s, group.consumers[name]).to(columns.device))
    return s


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32, so that a scale is applied with one rounding, to the tensor's dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gather_scale(s: Tensor, channel_map: Tensor) -> Tensor:
    """The scale [K] of a consumer's input channels: s[channel_map] of s [C], 1 where the map is -1."""
    return torch.where(channel_map >= 0, s[channel_map.clamp(min=0)], 1.0)


def group_modules(
    block: Block, group: Group, root: nn.Module | None = None
) -> tuple[nn.Module | None, dict[str, nn.Module]]:
    """The producer, if any, and the consumers by model-wide name, of a block or of ``root``, a copy of it."""
    consumers = {name: block.find(name, root) for name in group.consumers}
    return block.find(group.producer, root) if group.producer else None, consumers


def smooth_group_(
    proof: Proof, group: Group, s: Tensor, alpha: float, absmax: dict[str, Tensor]
) -> SmoothedGroup | str:
    """Folds one group of the proof's block by s [C], first on the proof's copy, and updates ``absmax``.

    An explicit scale is not folded: the 8-bit layers will apply it.

    Returns:
        The smoothed group; or, where the fold would change the block's output, the reason, and the group is left as it
        was.
    """
    producer, consumers = group_modules(proof.block, group)
    if producer is not None:
        failure = proof.try_fold(group, s) or _overflow(producer, consumers, group, s)
        if failure:
            return failure
        fold_(producer, consumers, group, s)
    quantized = [name for name in consumers if name in absmax]
    before = max(outlier_ratio(absmax[name]) for name in quantized)
    for name in quantized:
        absmax[name] = absmax[name] / gather_scale(s, group.consumers[name]).to(absmax[name])
    after = max(outlier_ratio(absmax[name]) for name in quantized)
    return SmoothedGroup(group.producer, group.kind, tuple(consumers), alpha, before, after)


def overflow(products: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """Names the first weight that a fold would push beyond its dtype's range (it happens in float16), or ''.

    Args:
        products: for each weight's name the absmax of its rows or columns, and the factors of these.
    """
    for name, (magnitude, factor) in products.items():
        if float((magnitude.cpu().double() * factor.double()).max()) > torch.finfo(magnitude.dtype).max:
            return f"folding it overflows {name} in {str(magnitude.dtype).removeprefix('torch.')}"
    return ""


def _overflow(producer: nn.Module, consumers: Mapping[str, nn.Module], group: Group, s: Tensor) -> str:
    products = {}
    for name, module in consumers.items():
        largest = [weight.abs().amax(dim=0) for weight in columns_of(module, group.layouts.get(name))]
        products[f"{name}.weight"] = torch.stack(largest).amax(dim=0), gather_scale(s, group.consumers[name])
    weight = weight_nk(as_linear(producer)) if is_linear(producer) else values_of(producer, "weight")
    for kind, values in (("weight", weight), ("bias", values_of(producer, "bias"))):
        if values is not None:
            products[f"{group.producer}.{kind}"] = values.abs().reshape(s.numel(), -1).amax(dim=1), 1 / s
    return overflow(products)


def _scatter_max_(target: Tensor, channel_map: Tensor, values: Tensor) -> None:
    mapped = channel_map >= 0
    target.scatter_reduce_(0, channel_map[mapped], values[mapped], "amax")
