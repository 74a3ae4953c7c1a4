"""Blocks as they are in the wild: quantized, or left in floating point with a reason, and never another function."""

from __future__ import annotations

import inspect
import random
from typing import Any

import hostile_blocks
import numpy as np
import pytest
import tiny
import torch
from hostile_blocks import EXCEPTIONS, Output, raising_off_fp32, raising_on_noise
from tiny_blocks import Block, Stack, batches
from torch import Tensor, nn

from smoothquant_ext import Recipe, SmoothQuantError, quantize
from smoothquant_ext.probing.blocks import capture_calls
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.report import Report

IDS = tiny.token_ids(2, 12, 7)
# Eight bits, rounded to nearest, cost such a stack 0.008 with all its seven layers.
MOST_ERROR = 0.015
BLOCKS = {
    name: kind
    for name, kind in vars(hostile_blocks).items()
    if inspect.isclass(kind) and issubclass(kind, Block) and kind is not Block
}
ELSEWHERE = "read by something other than its own forward pass"
REFERENCE = "called through another reference than its place in the model"
# Why ``up`` stays in floating point.
SKIPPED = {
    "TwiceFunctional": ELSEWHERE,
    "Functional": ELSEWHERE,
    "AsksDtype": ELSEWHERE,
    "AsksShape": ELSEWHERE,
    "Partial": REFERENCE,
    "Listed": REFERENCE,
    "CustomLinear": "Doubled computes something else than a linear layer",
    "ExtraArgument": "called with arguments that an 8-bit layer does not take",
    "Patched": "Linear computes something else than a linear layer",
    "Hooked": "Linear computes something else than a linear layer",
}
# Why ``norm`` is not smoothed.
UNSMOOTHED = {
    "TwiceFunctional": "also read by something other than up",
    "TwoNames": "a consumer shares its weight with another layer",
    "Tied": "a consumer shares its weight with another layer",
    "Parametrized": "computed from other parameters",
    "OldWeightNorm": "computed from other parameters",
}


class HostileStack(Stack):
    """Takes whatever blocks return."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x: Any = self.embed(input_ids)
        for layer in self.layers:
            output = layer(x)
            x = x if output is None else output
        if isinstance(x, tuple | Output | dict):
            x = x[0] if isinstance(x, tuple) else x.hidden if isinstance(x, Output) else x["hidden"]
        return self.head(x)


def output_of(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(IDS)


def relative_error(model: nn.Module, expected: Tensor) -> float:
    return float((output_of(model) - expected).norm() / expected.norm())


def quantized(kind: Any, **options: Any) -> tuple[nn.Module, Report, float]:
    model = HostileStack(make=kind)
    expected = output_of(HostileStack(make=kind))
    quantize(model, batches(4), Recipe(**options), progress=False)
    report: Report = model.smoothquant_report
    return model, report, relative_error(model, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_the_function_stays_and_what_is_left_out_has_a_reason(name: str) -> None:
    model, report, error = quantized(BLOCKS[name])
    assert error < MOST_ERROR
    assert type(model.layers[1].down).__name__ == "W8A8Linear"
    assert ("layers.1.up" in report.quantized) == (name not in SKIPPED)
    assert SKIPPED.get(name, "") in report.skipped.get("layers.1.up", "")
    if name in UNSMOOTHED:
        assert UNSMOOTHED[name] in report.failed["layers.1.norm"]


@pytest.mark.parametrize("name", ["Counting", "Partial", "InPlaceNone", "Inference"])
def test_layers_can_be_left_out_and_scales_be_searched(name: str) -> None:
    _, report, error = quantized(BLOCKS[name], alpha="auto", auto_skip=1)
    assert len([reason for reason in report.skipped.values() if "KL divergence" in reason]) == 1
    assert error < MOST_ERROR


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_a_block_that_fails_in_a_raised_dtype_is_not_smoothed(name: str) -> None:
    """The proof of a fold of an fp32 block runs in fp64 or, if that fails, in fp32."""
    _, report, error = quantized(raising_off_fp32(EXCEPTIONS[name]))
    assert error < MOST_ERROR
    assert not report.failed
    model = HostileStack(make=raising_off_fp32(EXCEPTIONS[name])).double()
    for layer in model.layers:
        layer.forward = _in_fp64_outside(layer)
    structure = find_structure(model.double(), IDS)
    rejected = discover(structure).rejected
    assert rejected.keys() == set(structure.called)
    assert all(name in reason for reason in rejected.values())


def _in_fp64_outside(layer: nn.Module) -> Any:
    """Runs a block that takes fp32 only within an fp64 model, but not when its copy is run."""
    plain = Block.forward
    calls = [0]

    def forward(x: Tensor) -> Tensor:
        calls[0] += 1
        return plain(layer, x) if calls[0] == 1 else type(layer).forward(layer, x)

    return forward


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_a_block_that_fails_on_noise_says_so(name: str) -> None:
    _, report, error = quantized(raising_on_noise(EXCEPTIONS[name]))
    assert error < MOST_ERROR
    assert "fails when its output is replaced by noise" in report.failed["layers.0.norm"]
    assert name in report.failed["layers.0.norm"]
    assert {group.producer.rpartition(".")[2] for group in report.groups} == {"up"}


@pytest.mark.parametrize("name", ["KeyError", "StopIteration", "Own"])
def test_a_model_that_fails_on_the_data_is_one_sentence(name: str) -> None:
    def fail(_x: Tensor) -> Tensor:
        raise EXCEPTIONS[name]

    model = Stack(between=fail)
    with pytest.raises(SmoothQuantError, match=rf"Stack fails on a batch of input_ids \[1, 9\] \({name}"):
        quantize(model, batches(), progress=False)
    assert all(isinstance(layer.up, nn.Linear) for layer in model.layers)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), torch.OutOfMemoryError("full"), MemoryError()])
def test_interrupts_and_full_memory_go_through(error: BaseException) -> None:
    model = HostileStack(make=raising_on_noise(error))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(type(error)):
        discover(find_structure(model, IDS))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_that_fails_with_8_bit_layers_is_named() -> None:
    class Fussy(Block):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.down).__name__ == "W8A8Linear":
                raise LookupError("what is this?")
            return super().forward(x)

    model = HostileStack(make=Fussy)
    with pytest.raises(SmoothQuantError, match=r"layers.0 fails with 8-bit layers in it .*LookupError.*--skip 'layers"):
        quantize(model, batches(), progress=False)
    assert isinstance(model.layers[0].down, nn.Linear)
    quantize(model, batches(), Recipe(skip=("down",)), progress=False)
    assert len(model.smoothquant_report.quantized) == 3


def test_a_block_that_runs_only_in_its_model_is_rounded_to_nearest() -> None:
    class Dependent(Block):
        """Takes no hidden states but those of its model."""

        handed: list[Tensor] = []  # noqa: RUF012  # shared on purpose

        def forward(self, x: Tensor) -> Tensor:
            if not any(x is each for each in self.handed):
                raise KeyError("whose hidden states are these?")
            y = super().forward(x)
            self.handed.append(y)
            return y

    class Handing(HostileStack):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            Dependent.handed.clear()
            x = self.embed(input_ids)
            Dependent.handed.append(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    model = Handing(make=Dependent)
    expected = output_of(model)
    quantize(model, batches(4), progress=False)
    report = model.smoothquant_report
    assert len(report.quantized) == 6
    assert report.failed["layers.0"].startswith("it fails when it runs alone (KeyError")
    assert relative_error(model, expected) < MOST_ERROR


def state_of(model: nn.Module) -> dict[str, Any]:
    layer = model.layers[0]
    plain = {name: getattr(layer, name, None) for name in ("calls", "is_rescaled", "activations")}
    stats = vars(layer.stats) | {"by_size": dict(layer.stats.by_size)} if hasattr(layer, "stats") else None
    return plain | {"log": list(getattr(layer, "log", [])), "stats": stats}


@pytest.mark.parametrize("name", ["Counting", "Rescaling", "Noisy", "OldWeightNorm"])
def test_finding_the_structure_leaves_everything_as_it_was(name: str) -> None:
    model = HostileStack(make=BLOCKS[name]).train()
    model.layers[1].eval()
    model.layers[0].norm.weight.requires_grad_(False)
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    before, attributes = {key: value.clone() for key, value in model.state_dict().items()}, state_of(model)
    tensors = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    randoms = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    discover(find_structure(model, IDS))
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == tensors
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []
    assert state_of(model) == attributes
    assert torch.equal(torch.get_rng_state(), randoms[0])
    assert random.getstate() == randoms[1]
    assert np.random.get_state()[1].tolist() == randoms[2]
    assert [layer.training for layer in model.layers] == [True, False, True]
    assert not model.layers[0].norm.weight.requires_grad
    assert torch.is_grad_enabled()


def test_a_result_kept_with_its_graph_does_not_hinder() -> None:
    """``copy.deepcopy`` refuses such a module."""
    model = HostileStack(make=BLOCKS["Counting"])
    model(IDS).sum().backward()
    assert model.layers[0].activations.grad_fn is not None
    expected = output_of(HostileStack(make=BLOCKS["Counting"]))
    quantize(model, batches(4), progress=False)
    assert relative_error(model, expected) < MOST_ERROR
    assert len(model.smoothquant_report.groups) == 6


def test_arguments_are_recorded_as_they_were() -> None:
    """A cache, a list and a dictionary that the block changes."""

    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []
            self.length = 0

    class Caching(Block):
        def forward(self, x: Tensor, cache: Cache, notes: list[int], options: dict[str, Any]) -> Tensor:  # type: ignore[override]
            y = super().forward(x + 0.1 * sum(cache.keys, torch.zeros(1)))
            cache.keys.append(y.detach())
            cache.length += 1
            notes.append(cache.length)
            assert options.pop("first")
            return y

    class CachingStack(Stack):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            x, cache, notes = self.embed(input_ids), Cache(), list[int]()
            for layer in self.layers:
                x = layer(x, cache, notes, options={"first": True})
            return self.head(x)

    model = CachingStack(make=Caching)
    calls = capture_calls(model, {f"layers.{i}": layer for i, layer in enumerate(model.layers)}, IDS)
    _, cache, notes = calls["layers.1"].args
    assert (len(cache.keys), cache.length, notes) == (1, 1, [1])
    assert calls["layers.1"].kwargs["options"] == {"first": True}
    first, second = (calls["layers.1"].replay(model.layers[1]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    expected = output_of(model)
    quantize(model, batches(4), progress=False)
    assert len(model.smoothquant_report.groups) == 6
    assert relative_error(model, expected) < MOST_ERROR


def test_equal_arguments_are_one_object_only_if_they_were() -> None:
    class Asking(Block):
        def forward(self, x: Tensor, same: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
            assert x is same
            assert x is not other
            other.add_(1)  # would change x if they shared memory
            return super().forward(x)

    class AskingStack(Stack):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                x = x.clone()  # not what the block before returned
                x = layer(x, x, x.clone())
            return self.head(x)

    model = AskingStack(make=Asking)
    expected = output_of(model)
    quantize(model, batches(4), progress=False)
    report = model.smoothquant_report
    assert not report.failed
    assert len(report.groups) == 6
    assert relative_error(model, expected) < MOST_ERROR


def test_a_block_without_a_tensor_proves_nothing() -> None:
    """What it computes goes another way, which no trial sees: it is not smoothed."""
    sink: list[Tensor] = []

    class Hiding(Block):
        def forward(self, x: Tensor) -> None:
            sink.append(super().forward(x))

    class HidingStack(Stack):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                layer(x)
                x = sink.pop()
            return self.head(x)

    model = HidingStack(make=Hiding)
    expected = output_of(model)
    quantize(model, batches(4), progress=False)
    report = model.smoothquant_report
    assert report.failed["layers.0.norm"] == "its block returns no tensor to compare"
    assert not report.groups
    assert len(report.quantized) == 6
    assert relative_error(model, expected) < MOST_ERROR


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_that_the_first_few_tokens_do_not_suit_gets_them_all(rows: int) -> None:
    class Chunked(Stack):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
            assert input_ids.shape == (rows, 20)
            return super().forward(input_ids)

    structure = find_structure(Chunked(), tiny.token_ids(rows, 20))
    assert structure.called == ("layers.0", "layers.1", "layers.2")
    assert len(discover(structure).groups) == 6
