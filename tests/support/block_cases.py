"""Blocks of tiny models, with what is needed to try things on them."""

from __future__ import annotations

import tiny
from tiny_blocks import Stack, batches
from torch import Tensor, nn

from smoothquant_ext.probing.blocks import Batch, BlockCall, find_blocks, run_model
from smoothquant_ext.probing.linears import weight_nk
from smoothquant_ext.probing.smoothing_groups import Group, discover, explicit_groups
from smoothquant_ext.probing.structure import Block, find_structure
from smoothquant_ext.quantization.alpha_search import Trial
from smoothquant_ext.quantization.block_inputs import BlockInputRecorder
from smoothquant_ext.quantization.calibration import calibrate
from smoothquant_ext.quantization.smoothing import by_block, group_modules, magnitudes
from smoothquant_ext.scheme import SCHEMES


def recorded(model: nn.Module, data: list[Batch]) -> BlockInputRecorder:
    recorder = BlockInputRecorder(find_blocks(model))
    for batch in data:
        with recorder.recording():
            run_model(model, batch)
    return recorder


class Case:
    """The first block of a model with what is needed to try things on it."""

    def __init__(self, architecture: str = "llama", scheme: str = "int8", explicit: bool = False) -> None:
        self.model: nn.Module = Stack() if architecture == "stack" else tiny.build(architecture)
        if architecture == "llama":
            tiny.amplify_outliers(self.model, factor=100.0)
        data = batches(2, rows=2, tokens=16)
        recorder = recorded(self.model, data)
        structure = find_structure(self.model, data[0])
        self.name = recorder.names[0]
        self.block: Block = structure.blocks[self.name]
        self.module = self.block.module
        linears = {self.full_name(local): self.module.get_submodule(local) for local in self.block.linears}
        self.absmax = calibrate(self.model, linears, data)
        self.calls: list[BlockCall] = recorder.calls(self.name, [])
        self.expected = [call.replay(self.module) for call in self.calls]
        self.scheme = SCHEMES[scheme]
        self.groups: list[Group] = by_block(discover(structure).groups, self.absmax)[self.name]
        if explicit:
            widths = {name: weight_nk(linear).shape[1] for name, linear in linears.items()}
            covered = {name for group in self.groups for name in group.consumers}
            self.groups += explicit_groups(self.name, [[name] for name in linears if name not in covered], widths)

    def full_name(self, local: str) -> str:
        return self.block.full_name(local)

    def trial(self, without: str = "") -> Trial:
        absmax = {name: values for name, values in self.absmax.items() if not without or without not in name}
        return Trial(self.block, absmax, self.scheme, self.calls, self.expected, {})

    def scale(self, group: Group, alpha: float) -> Tensor:
        consumers = group_modules(self.block, group)[1]
        return magnitudes(group, consumers, self.absmax, self.scheme).scale(alpha)
