"""Static scales: histograms against the raw values, and the choice against trying every candidate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from block_cases import Case
from tiny_blocks import ExpertBlock
from torch import Tensor

from smoothquant_ext.probing.structure import Block
from smoothquant_ext.quantization import clipping as clipping_module
from smoothquant_ext.quantization.alpha_search import Trial
from smoothquant_ext.quantization.block_statistics import Windows, collect_statistics
from smoothquant_ext.quantization.clipping import (
    BINS,
    GAIN,
    HEADROOM,
    LEVELS,
    PERCENTILES,
    RATIOS,
    Histogram,
    choose_clips_,
    limits,
)
from smoothquant_ext.quantization.recipe import CLIPPINGS
from smoothquant_ext.scheme import QMAX, SCHEMES

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "heavy tails": lambda x: x / x.roll(1).abs().clamp(min=1e-3),
    "one outlier": lambda x: x.index_fill(0, torch.tensor([7]), -500.0),
    "ReLU": lambda x: x.clamp(min=0),
    "uniform": lambda x: torch.special.ndtr(x) * 3,
    "constant": lambda x: torch.full_like(x, 2.5),
    "two values": lambda x: torch.where(x > 3, 100.0, 1e-3),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
    "few": lambda x: x[:5],
    "one": lambda x: x[:1],
}


def values(kind: str) -> Tensor:
    return KINDS[kind](torch.randn(100_000, generator=torch.Generator().manual_seed(0)))


def histogram(x: Tensor) -> Histogram:
    made = Histogram(float(x.abs().max()))
    for part in x.split(30_001):  # in several windows of odd sizes
        made.add(part)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_within_a_bin(kind: str) -> None:
    x = values(kind)
    made, width = histogram(x), float(x.abs().max()) / BINS
    assert float(made.counts.sum()) == x.numel()
    ordered = x.abs().double().sort().values
    for percent in (*PERCENTILES, 50.0, 100.0):
        rank = int(x.numel() * percent / 100)  # of two neighbours either will do
        low, high = (float(ordered[min(max(0, index), x.numel() - 1)]) for index in (rank - 1, rank))
        assert low * (1 - 1e-6) <= made.percentile(percent) <= high + width * (1 + 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", QMAX, ids=str)
def test_the_limit_of_least_squared_error(kind: str, dtype: torch.dtype) -> None:
    """Against the raw values, which lie within half a bin of what the histogram takes them for."""
    x = values(kind).abs().double()
    made = histogram(values(kind))

    def error(limit: float) -> float:
        steps = (x * (QMAX[dtype] / limit)).clamp(max=QMAX[dtype])
        kept = (steps.round() if dtype == torch.int8 else steps.float().to(dtype).double()) * (limit / QMAX[dtype])
        return float((kept - x).square().sum().sqrt())

    least = min(error(ratio * made.limit) for ratio in RATIOS)
    # The norm of the error moves by no more than that of the values, to which rounding adds as much again at worst.
    assert error(made.mse_limit(dtype)) <= least + 4 * (made.limit / BINS / 2) * x.numel() ** 0.5


def divergence(counts: list[float], bins: int) -> float:
    """KL(saturated || quantized to ``LEVELS``), as TensorRT's slides put it; mass where the latter is 0 counts as 1."""
    p = counts[:bins]
    p[-1] += sum(counts[bins:])
    q = [0.0] * bins
    for level in range(LEVELS):
        members = [index for index in range(bins) if index * LEVELS // bins == level and counts[index]]
        for index in members:
            q[index] = sum(counts[i] for i in members) / len(members)
    p, q = [x / sum(p) for x in p], [x / max(sum(q), 1e-300) for x in q]
    return sum(a * math.log(a / b) if b else a for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one outlier", "ReLU", "few"])
def test_the_divergence_of_a_few_ratios_is_the_textbooks(kind: str) -> None:
    made = histogram(values(kind))
    for ratio in (1 / 64, 3 / 64, 8 / 64):
        expected = divergence(made.counts.tolist(), max(LEVELS, round(ratio * BINS)))
        assert made._divergence(ratio * made.limit) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_limit_is_one_of_the_ratios(kind: str) -> None:
    made = histogram(values(kind))
    assert made.kl_limit() in [ratio * made.limit for ratio in RATIOS]


def test_kl_cuts_off_outliers_but_nothing_of_a_uniform_distribution() -> None:
    assert histogram(values("uniform")).kl_limit() == pytest.approx(float(values("uniform").max()))
    assert histogram(values("one outlier")).kl_limit() < 20
    assert histogram(values("normal")).kl_limit() > 2


def test_values_beyond_the_limit_count_as_the_largest() -> None:
    made = Histogram(1.0)
    made.add(torch.tensor([[0.25, -3.0, 1.0]], dtype=torch.bfloat16))
    assert made.counts.nonzero().flatten().tolist() == [BINS // 4, BINS - 1]
    assert made.counts[-1] == 2


@pytest.mark.parametrize("clipping", [clipping for clipping in CLIPPINGS if clipping != "absmax"])
def test_candidates(clipping: str) -> None:
    made, scheme = histogram(values("heavy tails")), SCHEMES["int8-static"]
    found = limits(made, clipping, scheme)
    rules = {
        "percentile": [made.percentile(percent) for percent in PERCENTILES],
        "mse": [made.mse_limit(scheme.dtype)],
        "kl": [made.kl_limit()],
    }
    rules["auto"] = [*(ratio * made.limit for ratio in HEADROOM), *(x for rule in rules.values() for x in rule)]
    assert found[0] == made.limit
    assert len(found) == len(set(found))
    assert set(found) == {made.limit, *rules[clipping]}


@pytest.mark.parametrize(
    ("architecture", "scheme", "explicit"),
    [
        ("llama", "int8-static", False),
        ("llama", "fp8-static", False),
        ("gpt2", "int8-static", True),
        ("bloom", "int8-static", False),
        ("stack", "int8-static", False),
    ],
)
@pytest.mark.parametrize("clipping", ["auto", "mse"])
def test_the_choice_is_the_best_candidate(
    architecture: str, scheme: str, explicit: bool, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One input after the other, each candidate on a copy; the absmax unless another one is clearly better."""
    case = Case(architecture, scheme, explicit)
    trial = case.trial()
    for group in case.groups:
        trial.fold_(group, case.scale(group, 0.5))
    linears = {local: case.module.get_submodule(local) for local in case.block.linears}
    statistics = collect_statistics(case.module, linears, case.calls, Windows({0}, {1}), hessians=False)
    shared = [tuple(map(case.full_name, each.consumers)) for each in statistics.inputs.values()]
    inputs = {names[0]: names for names in shared}
    expected, kept, candidates, reference = {}, {}, [], copy.deepcopy(trial)
    for name, consumers in inputs.items():
        taken: list[Tensor] = []
        hook = case.model.get_submodule(name).register_forward_pre_hook(lambda _m, a, taken=taken: taken.append(a[0]))
        for call in case.calls:
            call.replay(case.module)
        hook.remove()
        x = torch.cat([each.flatten(0, -2) for each in taken])
        scale = trial.input_scale(name)
        x = x if scale is None else x / scale
        made = Histogram(max(float(trial.smoothed_absmax(consumer).max()) for consumer in consumers))
        made.add(x)
        assert made.limit == pytest.approx(float(x.abs().max()), rel=1e-6)
        errors = {}
        candidates.append(limits(made, clipping, trial.scheme))
        for limit in candidates[-1]:
            attempt = copy.deepcopy(reference)
            attempt.clip_(consumers, limit)
            errors[limit] = attempt.block_error()
        best = min(errors, key=errors.__getitem__)
        if errors[best] < GAIN * errors[made.limit]:
            expected[name] = best
        kept[name] = expected.get(name, made.limit)
        reference.clip_(consumers, kept[name])
    start = trial.block_error()
    tried: list[list[float]] = []
    monkeypatch.setattr(clipping_module, "limits", lambda *args: tried.append(limits(*args)) or tried[-1])
    assert choose_clips_(trial, case.calls, inputs, clipping) == expected
    assert tried == candidates
    assert trial.block_error() == reference.block_error() <= start
    for name, consumers in inputs.items():
        for consumer in consumers:
            input_scale = case.block.find(consumer, trial.int8_block).input_scale
            assert float(input_scale) == pytest.approx(kept[name] / QMAX[trial.scheme.dtype])
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def alone(case: Case) -> dict[str, list[str]]:
    """Each layer of a block of ``Stack`` has an input for itself."""
    return {case.full_name(local): [case.full_name(local)] for local in ("up", "down")}


def test_an_outlier_that_does_not_matter_is_cut_off() -> None:
    """A channel that no weight reads, a hundred times larger than the rest."""
    case = Case("stack", "int8-static")
    with torch.no_grad():
        case.module.norm.weight[0] *= 1000
        case.module.up.weight[:, 0] = 0
    expected = [call.replay(case.module) for call in case.calls]
    absmax = dict(case.absmax) | {case.full_name("up"): case.absmax[case.full_name("up")].clone()}
    absmax[case.full_name("up")][0] *= 1000
    trial = Trial(case.block, absmax, case.scheme, case.calls, expected, {})
    before = trial.block_error()
    found = choose_clips_(trial, case.calls, alone(case), "auto")
    assert found[case.full_name("up")] < float(absmax[case.full_name("up")].max()) / 10
    assert trial.block_error() < before / 10


def test_dead_and_unread_inputs_get_no_limit() -> None:
    case = Case("stack", "int8-static")
    with torch.no_grad():
        case.module.norm.weight.zero_()
        case.module.norm.bias.zero_()
    absmax = {case.full_name("up"): torch.zeros_like(case.absmax[case.full_name("up")])}  # down is not quantized
    expected = [call.replay(case.module) for call in case.calls]
    trial = Trial(case.block, absmax, case.scheme, case.calls, expected, {})
    assert choose_clips_(trial, case.calls, alone(case), "auto") == {}
    assert trial.block_error() < 1e-3


@pytest.mark.parametrize("calls_empty", [True, False])
def test_an_expert_that_gets_no_token_keeps_its_range(calls_empty: bool) -> None:
    case = Case("stack", "int8-static")
    torch.manual_seed(0)
    block = ExpertBlock(calls_empty).eval()
    with torch.no_grad():
        for call in case.calls:
            call.args[0][..., 0] = -1  # nothing for the second one
    expected = [call.replay(block) for call in case.calls]
    names = ["experts.0", "experts.1"]
    absmax = {case.full_name(name): torch.full((40,), 4.0) for name in names}
    trial = Trial(Block(case.name, block), absmax, case.scheme, case.calls, expected, {})
    found = choose_clips_(trial, case.calls, {name: [name] for name in absmax}, "auto")
    assert case.full_name("experts.1") not in found
