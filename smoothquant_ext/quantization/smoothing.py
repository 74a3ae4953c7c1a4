"""Smoothing: chooses s for each group, proves that the fold preserves the function, and folds it into the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..probing.blocks import BlockCall
from ..probing.consumers import columns_of
from ..probing.linears import as_linear, is_linear, values_of, weight_nk
from ..probing.numerics import outlier_ratio, relative_error
from ..probing.smoothing_groups import Group
from ..scheme import Scheme
from .report import SmoothedGroup

# The proof runs in a raised dtype, but norms, rotary embeddings and softmax of most models compute in fp32 whatever
# their input: a few dozen fp32 roundings is what two runs of the same function may differ by.
PROOF_TOLERANCE = 64 * torch.finfo(torch.float32).eps


@dataclass
class Smoothing:
    """The groups that were smoothed, and why the others were not."""

    groups: list[SmoothedGroup] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


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
    """fp32 [K]: how large each column of a weight [N, K] is, as its quantizer sees it.

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
    """What the scale of a group is computed from; consumers that will not be quantized have no say."""
    channels = group.channels
    x, w = torch.zeros(channels), torch.zeros(channels)
    for name, module in consumers.items():
        if name in absmax:
            _scatter_max_(x, group.consumers[name], absmax[name].cpu())
            for weight in columns_of(module, group.readings.get(name)):
                _scatter_max_(w, group.consumers[name], column_absmax(weight, scheme).cpu())
    return Magnitudes(x, w)


def by_block(groups: Iterable[Group], absmax: Mapping[str, Tensor]) -> dict[str, list[Group]]:
    """The groups that feed a layer to be quantized, by block, in the order in which they are folded.

    Folding v -> o changes the rows of v that the norm's own scale is chosen by: linear producers go first.
    """
    members: dict[str, list[Group]] = {}
    for group in groups:
        if any(name in absmax for name in group.consumers):
            members.setdefault(group.block, []).append(group)
    return {block: sorted(own, key=lambda group: group.kind != "linear") for block, own in members.items()}


class Proof:
    """A copy of one block in a raised dtype, on which folds are tried before they reach the model."""

    def __init__(self, block: nn.Module, call: BlockCall, name: str) -> None:
        own = next(parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())
        self.prefix = f"{name}." if name else ""
        self.call = call
        self._raise_to(torch.float64 if own == torch.float32 else torch.float32, block)

    def _raise_to(self, dtype: torch.dtype, block: nn.Module) -> None:
        self.dtype = dtype
        self.block = copy.deepcopy(block).to(dtype)
        try:
            self.expected = self._run()
        except RuntimeError:
            if dtype != torch.float64:
                raise
            self._raise_to(torch.float32, block)  # some kernels (grouped products of experts) have no fp64

    def try_fold(self, group: Group, s: Tensor) -> str:
        """Folds the copy; if its output changes, undoes that and says by how much, else returns ''."""
        producer, consumers = group_modules(self.block, group, self.prefix)
        modules = [module for module in (producer, *consumers.values()) if module is not None]
        return self.attempt(modules, lambda: fold_(producer, consumers, group, s))

    def attempt(self, modules: Iterable[nn.Module], change: Callable[[], None]) -> str:
        """Changes parameters of the copy's ``modules``; as ``try_fold``."""
        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        before = {parameter: parameter.detach().clone() for parameter in parameters}
        change()
        error = max((relative_error(a, b) for a, b in zip(self.expected, self._run(), strict=True)), default=0.0)
        if error <= PROOF_TOLERANCE:
            return ""
        for parameter, value in before.items():
            parameter.data.copy_(value)
        return f"folding it changes the block's output by {error:.1e} (relative), so it was undone"

    def _run(self) -> list[Tensor]:
        return self.call.replay(self.block, self.dtype)


def fold_(producer: nn.Module | None, consumers: Mapping[str, nn.Module], group: Group, s: Tensor) -> None:
    """Divides the producer's output channels by s [C] and multiplies the consumers' columns by it, in place.

    Without a producer the columns alone are multiplied. A norm's weight is rounded to its dtype, and in 16 bits that
    changes a whole channel: the consumers are multiplied by what the norm was really divided by.
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
        for columns in columns_of(module, group.readings.get(name)):
            columns.copy_(_wide(columns) * gather_scale(s, group.consumers[name]).to(columns.device))


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32, so that a scale is applied with one rounding, to the tensor's own dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gather_scale(s: Tensor, channel_map: Tensor) -> Tensor:
    """s [C] as seen by a consumer's input channels [K]: s[channel_map], 1 where the map says -1."""
    return torch.where(channel_map >= 0, s[channel_map.clamp(min=0)], 1.0)


def group_modules(root: nn.Module, group: Group, prefix: str = "") -> tuple[nn.Module | None, dict[str, nn.Module]]:
    """The producer, if any, and the consumers by model-wide name, looked up below ``root`` (``prefix``)."""
    consumers = {name: root.get_submodule(name.removeprefix(prefix)) for name in group.consumers}
    return root.get_submodule(group.producer.removeprefix(prefix)) if group.producer else None, consumers


def smooth_group_(
    model: nn.Module,
    group: Group,
    s: Tensor,
    alpha: float,
    absmax: dict[str, Tensor],
    proof: Proof,
    result: Smoothing,
) -> bool:
    """Folds one group by s [C], first on a copy of its decoder block in a raised dtype (fp64 for fp32, fp32 for 16
    bits). If that changes the block's output, the group is left as it was and the reason goes into the result.

    An explicit scale is not folded: the 8-bit layers will apply it. Returns whether the group is smoothed now.
    """
    producer, consumers = group_modules(model, group)
    if producer is not None:
        failure = proof.try_fold(group, s) or _overflow(producer, consumers, group, s)
        if failure:
            result.failed[group.producer] = failure
            return False
        fold_(producer, consumers, group, s)
    watched = [name for name in consumers if name in absmax]
    before = max(outlier_ratio(absmax[name]) for name in watched)
    for name in watched:
        absmax[name] = absmax[name] / gather_scale(s, group.consumers[name]).to(absmax[name])
    after = max(outlier_ratio(absmax[name]) for name in watched)
    result.groups.append(SmoothedGroup(group.producer, group.kind, tuple(consumers), alpha, before, after))
    return True


def _overflow(producer: nn.Module | None, consumers: Mapping[str, nn.Module], group: Group, s: Tensor) -> str:
    """Says which weight the fold would push beyond its dtype's range (it happens in float16), or ''."""
    folded = []
    for name, module in consumers.items():
        largest = [weight.abs().amax(dim=0) for weight in columns_of(module, group.readings.get(name))]
        columns = torch.stack(largest).amax(dim=0)
        folded.append((f"{name}.weight", columns, gather_scale(s, group.consumers[name])))
    for kind in ("weight", "bias"):
        if producer is None:
            break
        values = (
            weight_nk(as_linear(producer)) if kind == "weight" and is_linear(producer) else values_of(producer, kind)
        )
        if values is not None:
            rows = values.abs().reshape(s.numel(), -1).amax(dim=1)
            folded.append((f"{group.producer}.{kind}", rows, 1 / s))
    for name, magnitude, factor in folded:
        if float((magnitude.cpu().double() * factor.double()).max()) > torch.finfo(magnitude.dtype).max:
            return f"folding it overflows {name} in {str(magnitude.dtype).removeprefix('torch.')}"
    return ""


def _scatter_max_(target: Tensor, channel_map: Tensor, values: Tensor) -> None:
    mapped = channel_map >= 0
    target.scatter_reduce_(0, channel_map[mapped], values[mapped], "amax")
