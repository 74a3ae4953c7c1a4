"""Smooths, rounds and measures the decoder blocks, one after the other, while the calibration data streams through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch, BlockCall, find_blocks, full_name, probe_batch, record_calls
from ..probing.experts import Reading
from ..probing.hooks import swapped
from ..probing.linears import Linear, find_linears, weight_nk
from ..probing.smoothing_groups import Group, explicit_groups
from ..scheme import Scheme
from .alpha_search import Choice, Trial, damage, search_alphas_
from .block_inputs import StreamRecorder
from .block_statistics import BlockInput, Observation, observe
from .clipping import choose_clips_
from .convert import quantize_experts, quantize_linear
from .expert_smoothing import HiddenRanges, smooth_experts_
from .recipe import AUTO, Recipe
from .resume import Journal
from .rounding import round_weight
from .sensitivity import Unit
from .smoothing import Proof, Smoothing, by_block, gather_scale, group_modules, magnitudes, smooth_group_


@dataclass
class Blocks:
    """What became of the decoder blocks.

    Attributes:
        layers: the 8-bit layers by name; not yet in the model.
        units: the sets of layers that share an input.
        smoothing: which groups were smoothed.
        errors: of each layer's output on held-out rows, relative to its size, squared: what quantization does to it.
        damages: of each block's output (see ``search.damage``).
        limits: largest magnitude that a static scale represents, relative to the absmax, by layer, where it was chosen.
        massive: inputs at which one token towers over the others: by how much over the median one, and its position.
        per_token: layers of a static scheme whose input has a scale per token.
        experts: the 8-bit experts of mixtures by name; not yet in the model.
    """

    layers: dict[str, W8A8Linear] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    smoothing: Smoothing = field(default_factory=Smoothing)
    errors: dict[str, float] = field(default_factory=dict)
    damages: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    massive: dict[str, tuple[float, int]] = field(default_factory=dict)
    per_token: list[str] = field(default_factory=list)
    experts: dict[str, W8A8Experts] = field(default_factory=dict)


MASSIVE = 50.0  # times the median token: worth telling
# The same for a static scale, which has to fit both. INT8: at four times, the median token is left with 32 of the 127
# steps. The steps of FP8 grow with the value.
UNFIT = {torch.int8: 4.0, torch.float8_e4m3fn: 50.0}


def quantize_blocks(
    model: nn.Module,
    recorder: StreamRecorder,
    held_out: set[int],
    groups: Sequence[Group],
    absmax: dict[str, Tensor],
    first: Batch,
    recipe: Recipe,
    journal: Journal,
    experts: Mapping[str, Reading] = MappingProxyType({}),
    hidden: HiddenRanges | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Blocks:
    """Folds smoothing into the model in place, and makes the 8-bit layers of its blocks.

    Args:
        model: the causal LM in floating point; its function stays what it is.
        recorder: holds what the blocks were called with.
        held_out: the recorded windows on which choices are measured.
        groups: what ``discover`` found; empty for no smoothing.
        absmax: calibrated absmax [K] of each layer to be quantized; updated to the smoothed activations.
        first: a batch for the proof that each fold preserves the function.
        recipe: what to do.
        journal: takes and gives the findings of the search.
        experts: how to read the experts of mixtures that are to be quantized, by name.
        hidden: what was seen within them; ``None`` for no smoothing there.
        progress: wraps the iterable of blocks.
    """
    done = Blocks()
    members = by_block(groups, absmax)
    blocks = find_blocks(model)
    calls = record_calls(model, {name: blocks[name] for name in recorder.names}, probe_batch(first))
    previous: Sequence[list[Tensor]] = ()
    for name in progress(recorder.names):
        clips = recipe.clips and name not in recorder.repeated  # ranges of other runs were not recorded
        mixtures = {each: reading for each, reading in experts.items() if each.startswith(full_name(name, ""))}
        worker = BlockQuantizer(
            name, blocks[name], recorder.calls(name, previous), held_out, absmax, recipe, clips, mixtures, hidden
        )
        own = members.get(name, []) + (worker.explicit_groups(members.get(name, [])) if recipe.explicit else [])
        choices, limits = worker.decide(own, journal)
        proof = Proof(blocks[name], calls[name], name)
        worker.apply_(model, choices, limits, proof, done)
        previous = worker.observation.outputs
    return done


class BlockQuantizer:
    """One block: what it shows in floating point, what is decided about it, and its 8-bit layers."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        calls: Sequence[BlockCall],
        held_out: set[int],
        absmax: dict[str, Tensor],
        recipe: Recipe,
        clips: bool,
        experts: Mapping[str, Reading],
        hidden: HiddenRanges | None,
    ) -> None:
        self.name, self.block, self.absmax, self.recipe = name, block, absmax, recipe
        self.clips, self.experts, self.hidden = clips, experts, hidden or HiddenRanges()
        self.linears: dict[str, Linear] = {
            local: linear for local, linear in find_linears(block).items() if full_name(name, local) in absmax
        }
        train = set(range(len(calls))) - held_out or held_out  # one window has to do for both
        self.calls = [calls[window] for window in sorted(train)]
        self.test_calls = [calls[window] for window in sorted(held_out)]
        self.observation: Observation = observe(
            block, self.linears, calls, held_out, train, hessians=recipe.rounding != "nearest"
        )
        self.expected = [self.observation.outputs[window] for window in sorted(held_out)]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Layers of a static scheme that get a scale per token: no one scale fits all tokens of their input."""
        if not self.recipe.clips:
            return {}
        return {
            full_name(self.name, reader): self.recipe.resolved_scheme.per_token
            for each in self.observation.inputs.values()
            if each.massive[0] > UNFIT[self.recipe.resolved_scheme.dtype]
            for reader in each.readers
        }

    def explicit_groups(self, folded: Sequence[Group]) -> list[Group]:
        """Groups of the inputs that no producer can be folded for."""
        covered = {name for group in folded for name in group.consumers}
        inputs = [
            names
            for each in self.observation.inputs.values()
            if not covered & set(names := [full_name(self.name, reader) for reader in each.readers])
        ]
        widths = {full_name(self.name, local): weight_nk(linear).shape[1] for local, linear in self.linears.items()}
        return explicit_groups(self.name, inputs, widths)

    def decide(self, groups: Sequence[Group], journal: Journal) -> tuple[list[Choice], dict[str, float]]:
        """The scale of each group, and the limit of each input's static scale, where chosen."""
        recipe = self.recipe
        is_searched = recipe.alpha == AUTO and bool(groups)
        if not is_searched and not self.clips:
            return [self._fixed(group, recipe.migration) for group in groups], {}
        if (found := journal.read(self.name)) is not None:
            scales, facts = found
            alphas = facts["alphas"]
            return [Choice(g, alphas[i], scales[str(i)]) for i, g in enumerate(groups)], facts["limits"]
        # Ranges of the held-out windows would be hindsight: what exceeds the others' saturates here as it will later.
        seen = {
            full_name(self.name, reader): each for each in self.observation.inputs.values() for reader in each.readers
        }
        absmax = {name: self.absmax[name] if each.absmax is None else each.absmax for name, each in seen.items()}
        absmax |= {name: self.absmax[name] for name in self.experts}
        trial = Trial(
            self.name,
            self.block,
            absmax,
            recipe.resolved_scheme,
            self.test_calls,
            self.expected,
            self.schemes,
            self.experts,
        )
        if is_searched:
            found_alphas = search_alphas_(trial, groups, recipe.migration)
            choices = [self._fixed(choice.group, choice.alpha) for choice in found_alphas]
        else:
            choices = [self._fixed(group, recipe.migration) for group in groups]
            for choice in choices:
                trial.fold_(choice.group, choice.s)
        limits: dict[str, float] = {}
        if self.clips:
            assert recipe.clipping is not None
            inputs = {
                name: each.readers
                for name, each in self.observation.inputs.items()
                if full_name(self.name, name) not in self.schemes
            }
            limits = choose_clips_(trial, self.block, self.calls, inputs, recipe.clipping)
        journal.write(
            self.name,
            {str(index): choice.s for index, choice in enumerate(choices)},
            {"alphas": [choice.alpha for choice in choices], "limits": limits},
        )
        return choices, limits

    def _fixed(self, group: Group, alpha: float | None) -> Choice:
        """A group's scale for an alpha, from all of the calibration data."""
        if alpha is None:
            return Choice(group, None, torch.ones(group.channels))
        prefix = f"{self.name}." if self.name else ""
        consumers = group_modules(self.block, group, prefix)[1]
        return Choice(group, alpha, magnitudes(group, consumers, self.absmax, self.recipe.resolved_scheme).scale(alpha))

    def apply_(
        self,
        model: nn.Module,
        choices: Sequence[Choice],
        limits: Mapping[str, float],
        proof: Proof,
        done: Blocks,
    ) -> None:
        """Folds what was decided, and makes and measures the 8-bit layers and experts."""
        scales: dict[str, Tensor] = {}  # what the input of each layer is divided by
        explicit: set[str] = set()
        unfolded: set[str] = set()  # their limits were chosen for another range
        for choice in choices:
            if choice.alpha is None:
                continue
            if smooth_group_(model, choice.group, choice.s, choice.alpha, self.absmax, proof, done.smoothing):
                scales |= {name: gather_scale(choice.s, seen) for name, seen in choice.group.consumers.items()}
                explicit |= choice.group.consumers.keys() if choice.group.kind == "explicit" else set()
            else:
                unfolded |= choice.group.consumers.keys()
        alpha, scheme = self.recipe.migration, self.recipe.resolved_scheme
        for name, reading in self.experts.items():
            smooth_experts_(model, name, reading, self.hidden, alpha, scheme, proof, done.smoothing)
        own: dict[str, W8A8Linear] = {}
        for first, each in self.observation.inputs.items():
            names = [full_name(self.name, reader) for reader in each.readers]
            done.units.append(Unit(self.name, tuple(names)))
            if each.massive[0] > MASSIVE:
                done.massive[names[0]] = each.massive
            for name, reader in zip(names, each.readers, strict=True):
                limit = None if name in unfolded else limits.get(first)
                if limit is not None:
                    done.limits[name] = limit / float(self.absmax[name].max())
                own[name] = self._quantize(reader, each, scales.get(name), name in explicit, limit)
                if each.rows:  # an expert may not run in the held-out windows
                    done.errors[name] = self._error(reader, own[name], each, scales.get(name))
        mixtures = {
            name: quantize_experts(model.get_submodule(name), reading, scheme) for name, reading in self.experts.items()
        }
        done.layers |= own
        done.experts |= mixtures
        done.per_token += self.schemes
        with swapped(model, {**own, **mixtures}):
            done.damages[self.name] = damage([call.replay(self.block) for call in self.test_calls], self.expected)

    def _quantize(
        self, reader: str, source: BlockInput, scale: Tensor | None, is_explicit: bool, limit: float | None
    ) -> W8A8Linear:
        """The 8-bit layer of a linear layer that is folded already, except if its scale is explicit."""
        linear = self.linears[reader]
        weight, hessian, smooth = weight_nk(linear), source.hessian, None
        if scale is not None and hessian is not None:
            column = scale.to(hessian)
            hessian = hessian / column / column[:, None]
        if is_explicit and scale is not None:
            smooth = scale.to(weight.device)
            weight = weight * smooth
        name = full_name(self.name, reader)
        rounding, scheme = self.recipe.rounding, self.schemes.get(name, self.recipe.resolved_scheme)
        assert rounding is not None
        rounded = round_weight(weight, scheme, rounding, hessian)
        absmax = self.absmax[name] if limit is None else torch.tensor(limit)
        return quantize_linear(linear, absmax, scheme, rounded, smooth)

    def _error(self, reader: str, layer: W8A8Linear, source: BlockInput, scale: Tensor | None) -> float:
        """Squared error of a layer's output on held-out rows, relative to the output's square."""
        rows = torch.cat(source.rows)
        if scale is not None and layer.smooth is None:
            rows = (rows.float() / scale.to(rows.device)).to(rows.dtype)  # what the folded producer gives
        with torch.no_grad():
            wanted, actual = self.linears[reader](rows).double(), layer(rows).double()
        tiny = torch.finfo(torch.float32).tiny
        return float((actual - wanted).square().sum() / wanted.square().sum().clamp(min=tiny))
