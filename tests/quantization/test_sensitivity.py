"""Sensitivity: what is measured is what a copy with these layers swapped does, and the model stays as it is."""

from __future__ import annotations

import copy
import itertools

import pytest
import tiny
import torch
from tiny_blocks import PairBlock, Stack, batches
from torch import Tensor, nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluation.accuracy import log_likelihood, mean_kl
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.blocks import find_blocks
from smoothquant_ext.probing.hooks import swapped
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.sensitivity import Sensitivity, Unit, fewest, worst, worst_first
from smoothquant_ext.scheme import SCHEMES


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids, use_cache=False)
    return torch.log_softmax((output if isinstance(output, Tensor) else output.logits).double(), -1)


def coarse(model: nn.Module) -> dict[str, W8A8Linear]:
    """8-bit layers of all blocks, with so coarse a static scale that the error is well above rounding."""
    names = [f"{block}.{local}" for block, module in find_blocks(model).items() for local in find_linears(module)]
    return {
        name: quantize_linear(model.get_submodule(name), torch.tensor(100.0), SCHEMES["int8-static"]) for name in names
    }


def units_of(model: nn.Module, layers: dict[str, W8A8Linear]) -> list[Unit]:
    """q, k and v in one, the rest alone."""
    units = []
    for block in find_blocks(model):
        own = [name for name in layers if name.startswith(f"{block}.")]
        shared = tuple(name for name in own if name.endswith(("q_proj", "k_proj", "v_proj")))
        units += [Unit(block, shared)] if shared else []
        units += [Unit(block, (name,)) for name in own if name not in shared]
    return units


STACKS = {
    "plain": Stack(),
    "multiplied between": Stack(between=lambda x: x * 1.5),
    "two tensors": Stack(make=PairBlock),
    "twice in a row": Stack(order=(0, 0, 1, 2)),
    "round and round": Stack(order=(0, 1, 2, 0, 1, 2)),
    "back and forth": Stack(order=(0, 1, 0, 2, 1)),
    "in another order": Stack(order=(2, 0, 1)),
    "one idle": Stack(order=(0, 2)),
}


@pytest.mark.parametrize("kind", [*STACKS, "llama", "bloom", "gemma3_text"])
def test_kl_is_that_of_a_copy_with_these_layers_swapped(kind: str) -> None:
    model = STACKS[kind] if kind in STACKS else tiny.build(kind)
    data = batches(3, rows=2)
    layers = coarse(model)
    units = units_of(model, layers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivity = Sensitivity(find_structure(model, data[0]), data)
    for unit in units:
        other = copy.deepcopy(model)
        for name in unit.layers:
            other.set_submodule(name, layers[name])
        wanted = 0.0
        for ids in data:
            p, q = log_probabilities(model, ids), log_probabilities(other, ids)
            wanted += float((p.exp() * (p - q)).sum(-1).mean()) / len(data)
        # fp32 logarithms of probabilities, some -20 in size: each of their products is off by that many eps.
        tolerance = 20 * torch.finfo(torch.float32).eps
        assert sensitivity.kl(unit, layers) == pytest.approx(wanted, rel=1e-4, abs=tolerance)
        ran = not (kind == "one idle" and "layers.1" in unit.block)
        assert (wanted > 10 * tolerance) == ran
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def is_untouched(model: nn.Module, modules: list[nn.Module]) -> bool:
    same = all(a is b for a, b in zip(model.modules(), modules, strict=True))
    return same and not any(
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in modules
    )


def test_the_model_is_as_before_also_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Stack(), batches(2)
    modules, layers = list(model.modules()), coarse(model)
    sensitivity = Sensitivity(find_structure(model, data[0]), data)
    assert is_untouched(model, modules)
    unit = Unit("layers.2", ("layers.2.up",))
    sensitivity.kl(unit, layers)
    assert is_untouched(model, modules)
    with pytest.raises(KeyError):
        sensitivity.kl(Unit("layers.2", ("layers.2.up", "layers.2.missing")), layers)
    assert is_untouched(model, modules)
    monkeypatch.setattr(W8A8Linear, "forward", lambda *_: 1 / 0)
    with pytest.raises(SmoothQuantError, match="ZeroDivisionError"):
        sensitivity.kl(unit, layers)
    assert is_untouched(model, modules)
    with pytest.raises(ZeroDivisionError), swapped(model, layers):
        model(data[0])
    assert is_untouched(model, modules)
    monkeypatch.setattr(model, "between", lambda _: 1 / 0)
    with pytest.raises(SmoothQuantError, match="ZeroDivisionError"):
        Sensitivity(find_structure(model, data[0]), data)
    assert is_untouched(model, modules)


def test_a_forward_of_a_blocks_own_is_put_back() -> None:
    """As tools set it on a module to move its arguments from device to device."""
    model, data = Stack(), batches(1)
    structure, runs = find_structure(model, data[0]), []
    original = model.layers[0].forward

    def forward(x: Tensor) -> Tensor:
        runs.append(1)
        return original(x)

    model.layers[0].forward = forward
    sensitivity = Sensitivity(structure, data)
    sensitivity.kl(Unit("layers.1", ("layers.1.up",)), coarse(model))
    assert len(runs) == 1
    assert model.layers[0].forward is forward


def test_blocks_before_the_measured_one_do_not_run() -> None:
    model, data = Stack(), batches(2)
    sensitivity, layers = Sensitivity(find_structure(model, data[0]), data), coarse(model)
    for measured in range(3):
        runs: list[str] = []
        hooks = [
            block.up.register_forward_hook(lambda *_, name=name, runs=runs: runs.append(name))
            for name, block in find_blocks(model).items()
        ]
        sensitivity.kl(Unit(f"layers.{measured}", (f"layers.{measured}.down",)), layers)
        for hook in hooks:
            hook.remove()
        assert runs == [f"layers.{index}" for index in range(measured, 3)] * 2


def test_kl_of_masked_tokens_and_of_many_positions() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 101, 17).double().log_softmax(-1)  # more positions than are summed at once
    assert mean_kl(p, q) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    assert mean_kl(p, p) == 0
    p[..., 0] = q[..., 0] = -torch.inf
    assert mean_kl(p, q) == pytest.approx(float((p.exp() * (p - q))[..., 1:].sum(-1).mean()))


def test_log_likelihood() -> None:
    model, data = Stack(), [*batches(2, rows=2), tiny.token_ids(1, 5)]
    parts = [log_probabilities(model, ids)[:, :-1].gather(-1, ids[:, 1:, None]).flatten() for ids in data]
    assert log_likelihood(model, data) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-6)
    assert log_likelihood(model, [{"input_ids": ids} for ids in data]) == log_likelihood(model, data)
    assert log_likelihood(model, [tiny.token_ids(1, 1)]) == 0


UNITS = [Unit("a", ("q", "k", "v")), Unit("a", ("o",)), Unit("a", ("gate", "up")), Unit("a", ("down",))]


@pytest.mark.parametrize("divergences", list(itertools.permutations((0.0, 0.3, 0.5, 0.9))))
def test_worst_takes_the_largest_divergence_per_layer_within_the_budget(divergences: tuple[float, ...]) -> None:
    table = dict(zip(UNITS, divergences, strict=True))
    order = worst_first(table)
    densities = [table[unit] / len(unit.layers) for unit in order]
    assert sorted(densities, reverse=True) == densities
    assert set(order) == set(UNITS)
    for count in range(9):
        chosen = worst(table, count)
        used = sum(len(unit.layers) for unit in chosen)
        assert used <= count
        assert chosen == [unit for unit in order if unit in chosen]
        # whatever was passed over did not fit beside those before it
        for unit in set(order) - set(chosen):
            before = sum(len(other.layers) for other in chosen if order.index(other) < order.index(unit))
            assert before + len(unit.layers) > count


@pytest.mark.parametrize("total", [0, 1, 2, 7, 8])
def test_fewest_is_the_least_that_is_enough(total: int) -> None:
    for needed in range(total + 2):
        asked: list[int] = []

        def is_enough(count: int, asked: list[int] = asked, needed: int = needed) -> bool:
            asked.append(count)
            return count >= needed

        expected = next((count for count in range(total + 1) if count >= needed), total)
        assert fewest(total, is_enough) == expected
        assert len(asked) == len(set(asked)) <= total.bit_length()
