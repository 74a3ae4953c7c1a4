"""The search for alpha: its measure, the copies of a block that it tries things on, and what it chooses."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from block_cases import Case
from torch import Tensor, nn

from smoothquant_ext.probing.smoothing_groups import Group
from smoothquant_ext.quantization.alpha_search import GRID, REFINED, Trial, block_error, search_alphas_
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.quantization.smoothing import fold_, gather_scale, group_modules


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_block_error_is_its_formula() -> None:
    torch.manual_seed(0)
    expected = [torch.randn(2, 5, 8), torch.randn(1, 3, 8) * 10]
    actual = [x + torch.randn_like(x) * 0.1 for x in expected]
    wanted = 0.0
    for x, y in zip(expected, actual, strict=True):
        error, size = (x - y).double().pow(2).sum(-1), x.double().pow(2).sum(-1)
        wanted += (error / size).mean() + error.sum() / size.sum()
    ids = torch.arange(3)  # blocks may return other things as well
    found = block_error([[ids, x] for x in actual], [[ids, x] for x in expected])
    assert found == pytest.approx(float(wanted) / 2, rel=1e-12)


def test_the_block_error_of_nothing_of_a_scaled_and_of_a_silent_output() -> None:
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert block_error([[x]], [[x]]) == 0
    assert block_error([[x * 4]], [[y * 4]]) == block_error([[x]], [[y]])
    assert block_error([[torch.zeros(1, 2, 3)]], [[torch.zeros(1, 2, 3)]]) == 0
    assert block_error([], []) == 0


def test_the_block_error_shows_the_loss_of_one_massive_token() -> None:
    x = torch.randn(1, 1000, 8)
    x[0, 0] = 1e4
    y = x.clone()
    y[0, 0] = 0
    assert block_error([[y]], [[x]]) > 1


CASES = [
    ("llama", "int8", False),
    ("llama", "int8-static", False),
    ("llama", "fp8-static", False),
    ("gemma", "int8", False),
    ("gpt2", "int8", True),
    ("bloom", "int8-static", True),
    ("stack", "int8", False),
]


@pytest.mark.parametrize(("architecture", "scheme", "explicit"), CASES)
def test_a_trial_is_the_folded_and_quantized_block(architecture: str, scheme: str, explicit: bool) -> None:
    """Bit for bit, for scales that are powers of two, at which nothing rounds; the original stays as it is."""
    case = Case(architecture, scheme, explicit)
    before = state(case.module)
    trial = case.trial()
    assert trial.block_error() > 0
    generator = torch.Generator().manual_seed(0)
    # exp2 itself may round; an offset norm is only exact without a scale
    scales = [
        torch.ldexp(torch.ones(group.channels), torch.randint(-3, 4, (group.channels,), generator=generator))
        if group.norm_offset == 0
        else torch.ones(group.channels)
        for group in case.groups
    ]
    for group, s in zip(case.groups, scales, strict=True):
        trial.fold_(group, s)
    found = [call.replay(trial.int8_block) for call in case.calls]
    assert all(torch.equal(value, before[name]) for name, value in case.module.state_dict().items())

    absmax = dict(case.absmax)
    divided: dict[str, Tensor] = {}
    for group, s in zip(case.groups, scales, strict=True):
        fold_(*group_modules(case.block, group), group, s)
        for name in group.consumers:
            absmax[name] = absmax[name] / gather_scale(s, group.consumers[name])
            if group.kind == "explicit":
                divided[name] = gather_scale(s, group.consumers[name])
    convert_(case.model, case.absmax, absmax, case.scheme)
    for name, s in divided.items():
        case.model.get_submodule(name).smooth = s
    for call, outputs in zip(case.calls, found, strict=True):
        assert torch.equal(call.replay(case.module)[0], outputs[0])
    assert trial.block_error() == block_error(found, case.expected)


@pytest.mark.parametrize(("architecture", "scheme", "explicit"), CASES)
def test_folding_twice_is_folding_once(architecture: str, scheme: str, explicit: bool) -> None:
    case = Case(architecture, scheme, explicit)
    once, twice = case.trial(), case.trial()
    for group in case.groups:
        once.fold_(group, case.scale(group, 0.7))
        for alpha in (0.3, 1.0, 0.7):
            twice.fold_(group, case.scale(group, alpha))
    for name, value in once.float_block.state_dict().items():
        other = twice.float_block.state_dict()[name]
        # Three more quotients and products, for each of up to two groups that a layer belongs to.
        size = (value.abs() + (1 if any(group.norm_offset for group in case.groups) else 0)).max()
        error = (value - other).abs()
        bound = 16 * torch.finfo(torch.float32).eps * (size if "norm" in name else value.abs())
        assert bool((error <= bound).all()), name
    for name in case.absmax:
        torch.testing.assert_close(once.smoothed_absmax(name), twice.smoothed_absmax(name))


def test_a_producer_that_is_not_quantized_is_folded_too() -> None:
    case = Case("llama")
    trial, reference = case.trial(without="v_proj"), copy.deepcopy(case.module)
    (group,) = (group for group in case.groups if group.producer.endswith("v_proj"))
    s = case.scale(group, 0.5)
    trial.fold_(group, s)
    fold_(*group_modules(case.block, group, reference), group, s)
    assert torch.equal(trial.int8_block.self_attn.v_proj.weight, reference.self_attn.v_proj.weight)
    assert trial.int8_block.self_attn.v_proj.weight.data_ptr() != trial.float_block.self_attn.v_proj.weight.data_ptr()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_choice_is_the_best_of_all_that_was_tried(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group in turn: nothing, every alpha of the grid, and what lies around the best; always in one order."""
    case = Case(architecture, explicit=architecture == "gpt2")
    tried: list[tuple[dict[int, Tensor], float]] = []
    measure = Trial.block_error

    def note(self: Trial) -> float:
        tried.append(({key: s for key, (_, s) in self.folds.items()}, measure(self)))
        return tried[-1][1]

    monkeypatch.setattr(Trial, "block_error", note)
    trial = case.trial()
    choices = search_alphas_(trial, case.groups, 0.5)
    assert [choice.group for choice in choices] == case.groups
    held = {id(group): case.scale(group, 0.5) for group in case.groups}
    for choice in choices:
        group = choice.group
        errors: dict[float | None, float] = {}

        def take(alphas: Sequence[float | None], group: Group = group, errors: dict = errors) -> float | None:
            for alpha in alphas:
                folds, errors[alpha] = tried.pop(0)
                s = torch.ones(group.channels) if alpha is None else case.scale(group, alpha)
                wanted = held | {id(group): s}
                assert all(torch.equal(s, wanted[key]) for key, s in folds.items())
            return min(errors, key=errors.__getitem__)

        best = take([None, *GRID])
        if best is not None:
            best = take([best + offset for offset in REFINED if 0 <= best + offset <= 1])
        assert choice.alpha == best
        assert torch.equal(choice.s, torch.ones(group.channels) if best is None else case.scale(group, best))
        held[id(group)] = choice.s
    assert not tried
    assert all(torch.equal(s, held[key]) for key, (_, s) in trial.folds.items())


class Target(Trial):
    """A trial whose error is how far the folds are from given ones."""

    wanted: Sequence[Tensor]

    def block_error(self) -> float:
        folds = [s for _, s in self.folds.values()]
        return sum(float((s.log() - want.log()).square().sum()) for s, want in zip(folds, self.wanted, strict=True))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.05, 0.3, 0.35, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("start", [0.5, 0.8])
def test_the_known_best_is_found(alpha: float | None, start: float) -> None:
    case = Case("stack")
    trial = Target(case.block, case.absmax, case.scheme, case.calls, case.expected, {})
    trial.wanted = [torch.ones(g.channels) if alpha is None else case.scale(g, alpha) for g in case.groups]
    choices = search_alphas_(trial, case.groups, start)
    assert len(choices) == 2
    for choice, wanted in zip(choices, trial.wanted, strict=True):
        assert choice.alpha == (None if alpha is None else pytest.approx(alpha))
        torch.testing.assert_close(choice.s, wanted)


def test_outliers_are_worth_smoothing() -> None:
    case = Case("llama")
    trial = case.trial()
    before = trial.block_error()
    choices = search_alphas_(trial, case.groups, 0.5)
    assert all(choice.alpha for choice in choices if choice.group.kind == "norm")
    assert trial.block_error() < before / 2


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_a_dead_channel_and_a_row_of_zeros(scheme: str) -> None:
    case = Case("stack", scheme)
    norm = case.module.norm
    with torch.no_grad():
        norm.weight[3] = norm.bias[3] = 0
        case.module.up.weight[5] = 0
        case.module.up.bias[5] = -1.0  # so that channel 5 is dead behind the ReLU
    for call, outputs in zip(case.calls, case.expected, strict=True):
        outputs[:] = call.replay(case.module)
    case.absmax[f"{case.name}.up"][3] = 0
    case.absmax[f"{case.name}.down"][5] = 0
    trial = case.trial()
    choices = search_alphas_(trial, case.groups, 0.5)
    assert all(bool((torch.isfinite(choice.s) & (choice.s > 0)).all()) for choice in choices)
    assert 0 < trial.block_error() < 0.1
