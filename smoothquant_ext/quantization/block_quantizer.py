"""Smooths, rounds and measures the decoder blocks, one after the other, while the calibration data streams through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SmoothQuantError
from ..hadamard import rotate_blocks
from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.blocks import BlockCall, device_of
from ..probing.hooks import swapped
from ..probing.linears import Linear, as_linear, weight_nk
from ..probing.smoothing_groups import Group, explicit_groups
from ..probing.structure import Block, Structure
from ..probing.trying import NOT_OF_THE_MODULE, Failed, attempt, in_words
from ..scheme import Scheme
from .alpha_search import Choice, Trial, block_error, search_alphas_
from .block_statistics import BlockInput, Windows, collect_statistics
from .calibration import Calibration, rotated_ranges
from .clipping import choose_clips_
from .convert import quantize_experts, quantize_linear, rotation_of_experts
from .expert_smoothing import smooth_experts_
from .placement import Placement
from .recipe import AUTO, Recipe
from .report import BlockReport, Report
from .resume import SearchState
from .rounding import round_weight
from .smoothing import Proof, by_block, gather_scale, group_modules, magnitudes, smooth_group_

ROUNDED = ("weight", "weight_scale")
MASSIVE_REPORTED = 50.0  # times the median token: worth telling
# The same for a static scale, which has to fit both. INT8: at four times, the median token is left with 32 of the 127
# steps. The steps of FP8 grow with the value.
MASSIVE_LIMIT = {torch.int8: 4.0, torch.float8_e4m3fn: 50.0}


@dataclass(frozen=True)
class Run:
    """The settings and measurements of one quantization run, shared by all blocks.

    Attributes:
        recipe: the settings.
        structure: of the model in floating point.
        calibration: the measurements; its ``absmax`` names the layers and experts to quantize.
        placement: where the blocks run.
        state: keeps the results of the search.
        report: takes the facts about layers and blocks, which has an entry for each layer of ``absmax``.
    """

    recipe: Recipe
    structure: Structure
    calibration: Calibration
    placement: Placement
    state: SearchState
    report: Report


@dataclass(frozen=True)
class Decision:
    """The decisions about one block, made before it is changed.

    Attributes:
        choices: the scale of each smoothing group.
        limits: the largest magnitude that an input's static scale represents, by the model-wide name of its first
            consumer, where one was chosen.
    """

    choices: list[Choice]
    limits: dict[str, float]


@dataclass
class QuantizedBlocks:
    """What takes the places of modules in the blocks of a model, and what has to change in those that stay.

    Attributes:
        linears: the 8-bit layers by name.
        experts: the 8-bit experts by name.
        folds: by the name of each block the scales that were folded, in that order; the layers are made for them.
    """

    linears: dict[str, W8A8Linear] = field(default_factory=dict)
    experts: dict[str, W8A8Experts] = field(default_factory=dict)
    folds: dict[str, list[Choice]] = field(default_factory=dict)


def quantize_blocks(
    run: Run, groups: Sequence[Group], progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> QuantizedBlocks:
    """Smooths copies of the blocks and makes 8-bit layers of them; the model is left as it is.

    Args:
        run: settings and measurements; its report is filled.
        groups: the smoothing groups; empty for no smoothing.
        progress: wraps the iterable of blocks.
    """
    quantized = QuantizedBlocks()
    recorder = run.calibration.recorder
    groups_of = by_block(groups, run.calibration.absmax)
    previous: Sequence[list[Tensor]] = ()
    for name in progress(recorder.names):
        # A function, so that of one block nothing but this is left when the next one begins.
        outputs = _quantize_block(run, name, recorder.calls(name, previous), groups_of.get(name, []), quantized)
        if outputs is None:
            break  # the next one needs them
        previous = outputs
    for name in groups_of.keys() - run.report.blocks.keys():
        run.report.failed.setdefault(name, "its calls could not be repeated, so it was quantized as it is")
    return quantized


def _quantize_block(
    run: Run, name: str, calls: Sequence[BlockCall], groups: Sequence[Group], quantized: QuantizedBlocks
) -> Sequence[list[Tensor]] | None:
    """Adds the 8-bit layers of a block; the tensors that it returns in floating point, for each window.

    ``None`` if the block does not run alone: its layers are converted as layers outside of all blocks are.
    """
    home = device_of(run.structure.blocks[name].module)
    quantizer = attempt(lambda: BlockQuantizer(run, run.placement.copy(run.structure.blocks[name]), calls))
    if isinstance(quantizer, Failed):
        run.report.failed[name or "the model"] = f"it fails when it runs alone ({quantizer.reason})"
        return None
    try:
        quantizer.apply_(quantizer.decide(groups))
    except (*NOT_OF_THE_MODULE, SmoothQuantError):
        raise
    except Exception as error:
        raise SmoothQuantError(
            f"{name or 'the model'} fails with 8-bit layers in it ({in_words(error)}): leave it, or the layers that "
            f"matter, in floating point with --skip {f'{name}.*'!r}"
        ) from error
    quantized.linears |= run.placement.sent_home(quantizer.linears, home)
    quantized.experts |= run.placement.sent_home(quantizer.experts, home)
    quantized.folds[name] = quantizer.folds
    return quantizer.statistics.outputs


class BlockQuantizer:
    """Quantizes one block: collects its statistics in floating point, decides, and makes its 8-bit layers.

    Smoothing changes the block, which therefore is a copy.

    Attributes:
        statistics: of the block in floating point.
        inputs: the layers that share each input, by the first of them; model-wide names.
        linears: the 8-bit layers by model-wide name, after ``apply_``.
        experts: the 8-bit experts by model-wide name, after ``apply_``.
        folds: the scales that were folded, after ``apply_``.
        rounded: the 8-bit weights and their scales, by model-wide name, after ``apply_``, or where an interrupted run
            left them.
    """

    def __init__(self, run: Run, block: Block, calls: Sequence[BlockCall]) -> None:
        """Runs the block on its recorded calls, one a window."""
        self.run, self.block, self.recipe = run, block, run.recipe
        self.absmax, self.scheme = run.calibration.absmax, run.recipe.resolved_scheme
        self.rotated = run.report.rotations.inputs
        self.unsmoothed = rotated_ranges(self.rotated, self.scheme)
        # The ranges of a repeated block's other runs were not recorded.
        self.clips = run.recipe.clips and block.name not in run.calibration.recorder.repeated
        self.linears: dict[str, W8A8Linear] = {}
        self.experts: dict[str, W8A8Experts] = {}
        self.folds: list[Choice] = []
        held_out = set(run.calibration.held_out)
        train = set(range(len(calls))) - held_out or held_out  # one window has to do for both
        self.calls = [calls[window] for window in sorted(train)]
        self.test_calls = [calls[window] for window in sorted(held_out)]
        self.proof_call = block.call or calls[0]
        layers = {local: self._linear(block.full_name(local)) for local in self._quantized(block.linears)}
        self.rounded = self._rounded_before(list(map(block.full_name, layers)))
        hessians = run.recipe.rounding != "nearest" and not self.rounded
        rotated = {local: self.unsmoothed.get(block.full_name(local), 0) for local in layers}
        self.statistics = collect_statistics(
            block.module, layers, calls, Windows(held_out, train), hessians, run.placement.keep, rotated
        )
        self.expected = [self.statistics.outputs[window] for window in sorted(held_out)]
        shared = [tuple(map(block.full_name, each.consumers)) for each in self.statistics.inputs.values()]
        self.inputs = {names[0]: names for names in shared}
        self.schemes = self._schemes()

    def decide(self, groups: Sequence[Group]) -> Decision:
        """Chooses the scale of each group, those of explicit smoothing included, and the limits of static scales."""
        groups = [group for group in groups if not self.unsmoothed.keys() & group.consumers.keys()]
        groups = [*groups, *(self._explicit_groups(groups) if self.recipe.explicit else ())]
        is_searched = self.recipe.alpha == AUTO and bool(groups)
        if not is_searched and not self.clips:
            return Decision([self._fixed(group, self.recipe.migration) for group in groups], {})
        if (stored := self.run.state.read(self.block.name)) is not None:
            scales, facts = stored
            alphas = facts["alphas"]
            return Decision([Choice(g, alphas[i], scales[str(i)]) for i, g in enumerate(groups)], facts["limits"])
        trial = Trial(
            self.block, self._other_ranges(), self.scheme, self.test_calls, self.expected, self.schemes, self.rotated
        )
        if is_searched:
            searched = search_alphas_(trial, groups, self.recipe.migration)
            choices = [self._fixed(choice.group, choice.alpha) for choice in searched]
        else:
            choices = [self._fixed(group, self.recipe.migration) for group in groups]
            for choice in choices:
                trial.fold_(choice.group, choice.s)
        limits: dict[str, float] = {}
        if self.clips:
            assert self.recipe.clipping is not None
            inputs = {name: consumers for name, consumers in self.inputs.items() if name not in self.schemes}
            limits = choose_clips_(trial, self.calls, inputs, self.recipe.clipping)
        self.run.state.write(
            self.block.name,
            {str(index): choice.s for index, choice in enumerate(choices)},
            {"alphas": [choice.alpha for choice in choices], "limits": limits},
        )
        return Decision(choices, limits)

    def apply_(self, decision: Decision) -> None:
        """Folds the scales, makes the 8-bit layers and experts, measures them, and fills the report."""
        report = self.run.report
        smoothed = self._smooth_(decision.choices)
        attempted = {name for choice in decision.choices if choice.alpha is not None for name in choice.group.consumers}
        for (first, names), source in zip(self.inputs.items(), self.statistics.inputs.values(), strict=True):
            if source.massive[0] > MASSIVE_REPORTED:
                report.layers[first].massive = source.massive
            for name in names:
                # Where a fold failed, the limit was chosen for another range.
                is_unfolded = name in attempted and name not in smoothed
                limit = None if is_unfolded else decision.limits.get(first)
                layer = self._quantize(name, source, smoothed.get(name), limit)
                self.linears[name] = layer
                report.layers[name].per_token = name in self.schemes
                if limit is not None:
                    report.layers[name].limit = limit / float(self.absmax[name].max())
                if source.rows:  # an expert may not run in the held-out windows
                    report.layers[name].error = self._error(name, layer, source, smoothed.get(name))
        if self.recipe.rounding != "nearest":
            tensors = {
                f"{name}.{part}": t
                for name, pair in self.rounded.items()
                for part, t in zip(ROUNDED, pair, strict=True)
            }
            self.run.state.write(self._state_of_rounding, tensors, {})
        for local in self._quantized(self.block.experts):
            module, layout = self.block.module.get_submodule(local), self.block.experts[local]
            self.experts[self.block.full_name(local)] = quantize_experts(
                module, layout, self.scheme, rotation_of_experts(self.rotated, self.block.full_name(local))
            )
        int8_modules = {self.block.local_name(name): layer for name, layer in {**self.linears, **self.experts}.items()}
        with swapped(self.block.module, int8_modules):
            outputs = [call.replay(self.block.module) for call in self.test_calls]
        report.blocks[self.block.name] = BlockReport(block_error(outputs, self.expected), list(self.inputs.values()))

    def _linear(self, name: str) -> Linear:
        return as_linear(self.block.find(name))

    def _quantized(self, names: Iterable[str]) -> list[str]:
        """Of local names those of layers and experts that are to be quantized."""
        return [local for local in names if self.block.full_name(local) in self.absmax]

    def _schemes(self) -> dict[str, Scheme]:
        """Layers of a static scheme that get a scale per token: no one scale fits all tokens of their input."""
        if not self.recipe.clips:
            return {}
        massive = [
            names
            for names, source in zip(self.inputs.values(), self.statistics.inputs.values(), strict=True)
            if source.massive[0] > MASSIVE_LIMIT[self.scheme.dtype]
        ]
        return {name: self.scheme.per_token for names in massive for name in names}

    def _explicit_groups(self, folded: Sequence[Group]) -> list[Group]:
        """Groups of the inputs that no producer can be folded for."""
        covered = {name for group in folded for name in group.consumers} | self.rotated.keys()
        inputs = [names for names in self.inputs.values() if not covered & set(names)]
        widths = {name: weight_nk(self._linear(name)).shape[1] for names in inputs for name in names}
        return explicit_groups(self.block.name, inputs, widths)

    def _other_ranges(self) -> dict[str, Tensor]:
        """absmax [K] by model-wide name, over the windows that are not held out.

        Over the held-out windows too, it would be hindsight: what exceeds the others' range saturates in the trial as
        it will later.
        """
        absmax = {}
        for names, source in zip(self.inputs.values(), self.statistics.inputs.values(), strict=True):
            for name in names:
                absmax[name] = self.absmax[name] if source.absmax is None else source.absmax
        experts = map(self.block.full_name, self._quantized(self.block.experts))
        return absmax | {name: self.absmax[name] for name in experts}

    def _fixed(self, group: Group, alpha: float | None) -> Choice:
        """A group's scale for an alpha, from all of the calibration data."""
        if alpha is None:
            return Choice(group, None, torch.ones(group.channels))
        consumers = group_modules(self.block, group)[1]
        return Choice(group, alpha, magnitudes(group, consumers, self.absmax, self.scheme).scale(alpha))

    def _smooth_(self, choices: Sequence[Choice]) -> dict[str, Choice]:
        """Folds the scales and those within experts, and reports it; the choice that smoothed each layer's input."""
        report, smoothed = self.run.report, dict[str, Choice]()
        experts = [self.block.full_name(local) for local in self._quantized(self.block.experts)]
        if not choices and not experts:
            return smoothed
        proof = Proof(self.block, self.proof_call)
        for choice in choices:
            if choice.alpha is None:
                continue
            outcome = smooth_group_(proof, choice.group, choice.s, choice.alpha, self.absmax)
            if isinstance(outcome, str):
                report.failed[choice.group.producer] = outcome
                continue
            report.groups.append(outcome)
            if choice.group.producer:
                self.folds.append(choice)
            for name in choice.group.consumers:
                smoothed[name] = choice
                if name in report.layers:
                    report.layers[name].alpha, report.layers[name].after = choice.alpha, self.absmax[name]
        for name in experts:
            within = smooth_experts_(proof, name, self.run.calibration.hidden, self.recipe.migration, self.scheme)
            if isinstance(within, str):
                report.failed[f"{name}.up"] = within
            elif within is not None:
                report.groups.append(within)
        return smoothed

    def _quantize(self, name: str, source: BlockInput, choice: Choice | None, limit: float | None) -> W8A8Linear:
        """The 8-bit layer of a linear layer that is folded already, except if its scale is explicit."""
        linear, hessian, smooth = self._linear(name), source.hessian, None
        weight = weight_nk(linear)
        if choice is not None:
            scale = gather_scale(choice.s, choice.group.consumers[name])
            if hessian is not None:
                column = scale.to(hessian)
                hessian = hessian / column / column[:, None]
            if choice.group.kind == "explicit":
                smooth = scale.to(weight.device)
                weight = weight * smooth
        rounding, scheme = self.recipe.rounding, self.schemes.get(name, self.scheme)
        assert rounding is not None
        rotate = self.rotated.get(name, 0)
        if name not in self.rounded:
            if hessian is not None and rotate:
                hessian = rotate_blocks(rotate_blocks(hessian, rotate).t(), rotate)
            self.rounded[name] = round_weight(rotate_blocks(weight, rotate), scheme, rounding, hessian)
        rounded = self.rounded[name]
        absmax = self.absmax[name] if limit is None else torch.tensor(limit)
        return quantize_linear(linear, absmax, scheme, rounded, smooth, rotate)

    @property
    def _state_of_rounding(self) -> str:
        return f"{self.block.name or 'model'}.rounded"

    def _rounded_before(self, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """What an interrupted run rounded of these layers by GPTQ or clipping: all of them, or nothing."""
        stored = None if self.recipe.rounding == "nearest" else self.run.state.read(self._state_of_rounding)
        tensors = {} if stored is None else stored[0]
        if tensors.keys() != {f"{name}.{part}" for name in names for part in ROUNDED}:
            return {}
        device = device_of(self.block.module)
        return {
            name: (tensors[f"{name}.{ROUNDED[0]}"].to(device), tensors[f"{name}.{ROUNDED[1]}"].to(device))
            for name in names
        }

    def _error(self, name: str, layer: W8A8Linear, source: BlockInput, choice: Choice | None) -> float:
        """Squared error of a layer's output on held-out rows, relative to the output's square."""
        rows = torch.cat(source.rows)
        if choice is not None and layer.smooth is None:
            scale = gather_scale(choice.s, choice.group.consumers[name])
            rows = (rows.float() / scale.to(rows.device)).to(rows.dtype)  # what the folded producer gives
        with torch.no_grad():
            expected, actual = self._linear(name)(rows).double(), layer(rows).double()
        tiny = torch.finfo(torch.float32).tiny
        return float((actual - expected).square().sum() / expected.square().sum().clamp(min=tiny))
