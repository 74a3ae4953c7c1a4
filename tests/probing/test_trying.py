"""Trials: whatever is raised becomes a reason, whatever is changed is changed back."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import OrderedDict, deque
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile_blocks import EXCEPTIONS
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from smoothquant_ext.probing.copies import copy_of, raised_
from smoothquant_ext.probing.hooks import output_of, swapped
from smoothquant_ext.probing.trying import Failed, attempt, repeatable, untouched
from smoothquant_ext.probing.values import leaves_of, map_values, tensors_in


class Writer(nn.Module):
    """Writes in every way into whatever it holds, and then raises, if asked to."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("table", torch.zeros(4))
        self.keys, self.nested = torch.zeros(2), {"list": [1], "deep": {"set": {1}}}
        self.queue, self.cache = deque([1]), SimpleNamespace(length=0, values=[torch.zeros(2)])
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.add_(1)
            self.weight.data[0] = 7
        self.table[1:3] = x.sum()
        torch.add(self.table, 1, out=self.table)
        self.keys.copy_(x.flatten()[:2])
        self.cache.values[0].view(1, 2).zero_().add_(5)
        self.cache.values.append(x)
        self.cache.length, self.added = 3, 4
        self.nested["list"].append(2)
        self.nested["deep"]["set"].add(2)
        self.queue.append(2)
        self.train(not self.training)
        self.weight.requires_grad_(False)
        self.other = nn.Linear(2, 2)
        self.register_forward_hook(lambda *_: None)
        torch.rand(3)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        if self.error is not None:
            raise self.error
        return x + self.weight


def facts(module: Writer) -> dict[str, Any]:
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    held = [module.keys.tolist(), [value.tolist() for value in module.cache.values], module.cache.length]
    names = sorted(name for name in vars(module) if name != "error")
    flags = [module.training, module.weight.requires_grad, len(module._forward_hooks), list(module._modules)]
    settings = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist()]
    return {"all": copy.deepcopy([state, held, module.nested, list(module.queue), names, flags, settings])}


INTERRUPTS = [KeyboardInterrupt(), SystemExit(2), torch.OutOfMemoryError("full"), MemoryError("full")]
INTERRUPTS.append(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"))


@pytest.mark.parametrize("error", [None, *EXCEPTIONS.values(), *INTERRUPTS], ids=lambda error: type(error).__name__)
def test_everything_is_as_it_was(error: BaseException | None) -> None:
    module = Writer(error)
    objects, before = (id(module.weight), id(module.table), id(module.keys)), facts(module)
    if error in INTERRUPTS:
        with pytest.raises(type(error)):
            attempt(lambda: module(torch.ones(3, 3)), module)
    else:
        outcome = attempt(lambda: module(torch.ones(3, 3)), module)
        if error is None:
            assert isinstance(outcome, Tensor)
        else:
            assert isinstance(outcome, Failed)
            assert outcome.reason.startswith(type(error).__name__)
    assert facts(module) == before
    assert (id(module.weight), id(module.table), id(module.keys)) == objects


def test_inference_tensors_are_restored_too() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.values = torch.zeros(3)
        with untouched(module):
            module.values.add_(1)
    assert module.values.tolist() == [0, 0, 0]


def test_a_reason_is_one_short_line() -> None:
    def fail(message: str) -> None:
        raise ValueError(message)

    def reason(message: str) -> str:
        outcome = attempt(lambda: fail(message))
        assert isinstance(outcome, Failed)
        return outcome.reason

    assert reason("first.\nsecond") == "ValueError: first"
    assert reason("") == "ValueError"
    assert len(reason("x" * 1000)) < 200


@pytest.mark.parametrize("error", EXCEPTIONS.values(), ids=lambda error: type(error).__name__)
def test_a_module_that_raises_has_no_output(error: Exception) -> None:
    assert output_of(Writer(error), torch.ones(3, 3)) is None


def test_compiled_modules_run_as_they_are_written() -> None:
    layer = nn.Linear(3, 3)
    compiled = torch.compile(nn.Sequential(layer), backend=_refuses)
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert isinstance(attempt(lambda: compiled(torch.ones(2, 3)), compiled), Tensor)
    assert seen == [1]


def _refuses(*_args: Any) -> Any:
    raise AssertionError("nothing is compiled in a trial")


def test_random_numbers_repeat_and_go_on() -> None:
    torch.manual_seed(4)
    following = torch.rand(2)
    torch.manual_seed(4)
    draws = []
    for _ in range(2):
        with repeatable(torch.device("cpu")):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.rand(2), following)


@dataclasses.dataclass
class Pair:
    hidden: Tensor
    other: Any = None


class Kind(Enum):
    ONE = 1


def test_copies_share_no_tensor_and_keep_identities() -> None:
    x = torch.zeros(2)
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    layer, lock = nn.Linear(2, 2), threading.Lock()
    named = OrderedDict(b=x, a=[x, (x, None)])
    value = {"x": x, "cache": cache, "layer": layer, "kind": Kind.ONE, "lock": lock, "named": named, "pair": Pair(x)}
    value["self"] = value
    copied = map_values(lambda tensor: tensor + 1, value)
    assert copied["self"] is copied
    assert copied["x"] is copied["named"]["b"] is copied["named"]["a"][1][0] is copied["pair"].hidden
    assert copied["x"].tolist() == [1, 1]
    assert copied["layer"] is layer
    assert copied["kind"] is Kind.ONE
    assert copied["lock"] is lock
    copied["cache"].update(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), 0)
    assert (copied["cache"].get_seq_length(), cache.get_seq_length()) == (3, 2)
    assert copied["cache"].layers[0].keys[0, 0, 0, 0] == 2
    assert len(leaves_of(value, Tensor)) == 3


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (torch.zeros(1), 1),
        ((torch.zeros(1), None, [torch.zeros(1)]), 2),
        ({"a": torch.zeros(1)}, 1),
        (CausalLMOutput(logits=torch.zeros(1)), 1),
        (Pair(torch.zeros(1), Pair(torch.zeros(1))), 2),
        (SimpleNamespace(hidden=torch.zeros(1)), 1),
        ((torch.zeros(1), SimpleNamespace(keys=torch.zeros(1))), 1),  # such as a cache beside hidden states
        (None, 0),
        ((), 0),
    ],
)
def test_tensors_in_what_modules_return(value: Any, count: int) -> None:
    assert len(tensors_in(value)) == count


def test_copies_of_what_deepcopy_refuses() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    module.lock = threading.Lock()
    module.output = module[0](torch.ones(3))
    module.register_buffer("angles", torch.polar(torch.ones(2), torch.ones(2)))
    with pytest.raises((TypeError, RuntimeError)):
        copy.deepcopy(module)
    other = copy_of(module)
    assert other.lock is module.lock
    assert torch.equal(other.output, module.output)
    assert other[0].weight is not module[0].weight
    raised = raised_(other, torch.float64)
    assert (raised[0].weight.dtype, raised.angles.dtype) == (torch.float64, torch.complex64)
    assert torch.equal(raised.angles, module.angles)


def test_a_module_is_swapped_wherever_it_is() -> None:
    shared, parent = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    model = nn.Sequential(shared, parent, shared, parent)
    inner, first, second = parent[0], nn.Identity(), nn.ReLU()
    with swapped(model, {"0": first, "1.0": second}):
        assert [model[0], model[1][0], model[2], model[3][0]] == [first, second, first, second]
    assert [model[0], model[1][0], model[2], model[3][0]] == [shared, inner, shared, inner]
