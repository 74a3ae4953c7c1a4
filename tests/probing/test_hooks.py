"""Hooks that last as long as a ``with`` body, and modules swapped as long."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_ext.probing.hooks import hooked, is_watched, output_of, swapped


class Scaled(nn.Module):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor


def hooks_of(modules: dict[str, nn.Module]) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values())


def test_every_call_is_noted_with_its_name_arguments_and_output() -> None:
    modules: dict[str, nn.Module] = {"a": Scaled(), "b": Scaled()}
    notes: list[Any] = []
    with hooked(
        modules,
        before=lambda name, args, kwargs: notes.append((name, float(args[0]), kwargs)),
        after=lambda name, args, kwargs, output: notes.append((name, float(args[0]), kwargs, float(output))),
    ):
        modules["b"](torch.tensor(2.0), factor=3.0)
        modules["a"](torch.tensor(5.0))
    assert notes == [("b", 2, {"factor": 3}), ("b", 2, {"factor": 3}, 6), ("a", 5, {}), ("a", 5, {}, 5)]
    assert hooks_of(modules) == 0
    modules["a"](torch.tensor(1.0))
    assert len(notes) == 4


def test_arguments_and_outputs_can_be_replaced() -> None:
    modules: dict[str, nn.Module] = {"a": Scaled()}
    with hooked(modules, before=lambda _name, args, _kwargs: ((args[0] + 1,), {"factor": 10.0})):
        assert modules["a"](torch.tensor(1.0)) == 20
    with hooked(modules, after=lambda _name, _args, _kwargs, output: output - 1):
        assert modules["a"](torch.tensor(1.0)) == 0


def test_a_failure_removes_the_hooks() -> None:
    modules: dict[str, nn.Module] = {"a": Scaled(), "b": Scaled()}
    with pytest.raises(TypeError), hooked(modules, before=lambda *_: None, after=lambda *_: None):
        modules["a"]("nothing", factor=0.5)
    assert hooks_of(modules) == 0


def test_output_of_what_is_no_function_of_one_tensor() -> None:
    x = torch.ones(2, 3)
    assert torch.equal(output_of(Scaled(), x), x)
    assert output_of(nn.Bilinear(3, 3, 2), x) is None
    assert output_of(nn.LSTM(3, 2), x) is None  # a tuple


def test_swapped_modules_come_back_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    originals = list(model)
    with swapped(model, {"0": Scaled()}):
        assert isinstance(model[0], Scaled)
    assert list(model) == originals
    with pytest.raises(RuntimeError), swapped(model, {"0": Scaled(), "1": nn.Linear(5, 5)}):
        model(torch.ones(1, 3))
    assert list(model) == originals


class Forwards:
    """What accelerate leaves in a module: a hook, and a forward pass that calls it."""

    def __init__(self, offload: bool | None) -> None:
        if offload is not None:
            self.offload = offload


@pytest.mark.parametrize(("offload", "expected"), [(False, False), (True, True), (None, True)])
def test_hooks_of_accelerate_that_only_move_inputs_do_not_watch(offload: bool | None, expected: bool) -> None:
    layer = nn.Linear(2, 2)
    assert not is_watched(layer)
    plain, layer.forward = layer.forward, functools.partial(layer.forward)  # type: ignore[method-assign]
    assert is_watched(layer)
    vars(layer)["_hf_hook"] = Forwards(offload)
    assert is_watched(layer) == expected
    layer.forward = plain  # type: ignore[method-assign]  # as accelerate leaves it behind
    assert not is_watched(layer)
    handle = layer.register_forward_hook(lambda *_: None)
    assert is_watched(layer)
    handle.remove()
    assert not is_watched(layer)
