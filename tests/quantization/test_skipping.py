"""Leaving layers out: within the budget, in whole units, with a reason, and no more than it takes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from smoothquant_ext.evaluation.accuracy import log_likelihood
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.blocks import find_blocks
from smoothquant_ext.probing.hooks import swapped
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.probing.structure import Structure, find_structure
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.resume import SearchState
from smoothquant_ext.quantization.sensitivity import Sensitivity, Unit, worst_first
from smoothquant_ext.quantization.skipping import MEASUREMENTS, MOST_TOKENS, Skips, choose_skips
from smoothquant_ext.scheme import SCHEMES, Scheme

SHARED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
BATCHES = [tiny.token_ids(2, 16, seed) for seed in range(3)]
NOTHING = SearchState(None)


class Case:
    """A small Llama, its 8-bit layers and its units; ``spoiled`` layers cost far more than the others."""

    def __init__(self, scheme: str | Scheme = "int8", spoiled: tuple[str, ...] = (), by: str = "weight") -> None:
        self.recipe_scheme = SCHEMES[scheme] if isinstance(scheme, str) else scheme
        self.model = tiny.build("llama")
        self.layers: dict[str, W8A8Linear] = {}
        self.units: list[Unit] = []
        for block, module in find_blocks(self.model).items():
            linears = find_linears(module)
            alone = [(name,) for name in linears if not any(name in names for names in SHARED)]
            self.units += [Unit(block, tuple(f"{block}.{name}" for name in names)) for names in [*SHARED, *alone]]
            for name, linear in linears.items():
                layer = quantize_linear(linear, torch.tensor(8.0), self.recipe_scheme)
                if f"{block}.{name}" in spoiled:
                    if by == "weight":
                        layer.weight_scale *= 1.5
                    else:
                        layer.input_scale *= 40
                self.layers[f"{block}.{name}"] = layer

    def choose(self, state: SearchState = NOTHING, batches: list[Tensor] = BATCHES, **settings: float) -> Skips:
        recipe = Recipe(self.recipe_scheme, **settings)
        return choose_skips(find_structure(self.model, BATCHES[0]), self.layers, self.units, batches, recipe, state)

    def increase(self, left_out: set[str]) -> float:
        """How much the perplexity rises with all other layers in 8 bits, measured on a copy."""
        model = copy.deepcopy(self.model)
        for name, layer in self.layers.items():
            if name not in left_out:
                model.set_submodule(name, layer)
        return math.expm1(log_likelihood(self.model, BATCHES) - log_likelihood(model, BATCHES))


@pytest.mark.parametrize("auto_skip", [1, 2, 3, 7, 14, 100, 0.07, 0.25, 0.5, 0.9999])
def test_the_budget_is_respected_and_units_stay_whole(auto_skip: float) -> None:
    case = Case(spoiled=("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"))
    skips = case.choose(auto_skip=auto_skip)
    budget = auto_skip if auto_skip >= 1 else auto_skip * 14
    assert len(skips.reasons) <= budget
    assert len(skips.reasons) > min(budget, 14) - 3  # the largest unit has three
    for unit in case.units:
        assert len({name in skips.reasons for name in unit.layers}) == 1
    assert set(skips.sensitivity) == set(case.units)
    assert not skips.dynamic


@pytest.mark.parametrize("spoiled", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_the_spoiled_layer_goes_and_takes_its_unit_along(spoiled: str) -> None:
    case = Case(spoiled=(spoiled,))
    (unit,) = (unit for unit in case.units if spoiled in unit.layers)
    skips = case.choose(auto_skip=len(unit.layers))
    assert worst_first(skips.sensitivity)[0] == unit
    assert set(skips.reasons) == set(unit.layers)
    for reason in skips.reasons.values():
        assert reason.startswith("it alone costs" if len(unit.layers) == 1 else "with what shares its input it costs")
        assert f"{skips.sensitivity[unit]:.2g} nats a token" in reason


def test_the_sensitivities_are_those_measured() -> None:
    case = Case()
    sensitivity = Sensitivity(find_structure(case.model, BATCHES[0]), BATCHES)
    expected = {unit: sensitivity.kl(unit, case.layers) for unit in case.units}
    assert case.choose(auto_skip=1).sensitivity == expected


@pytest.mark.parametrize(
    "spoiled",
    [
        (),
        ("model.layers.0.self_attn.v_proj",),
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("limit", [1e-5, 1e-3, 0.02, 10.0])
def test_the_perplexity_stays_within_its_limit(spoiled: tuple[str, ...], limit: float) -> None:
    """Leaving out one unit less, of those in order of their sensitivity, would not have been enough."""
    case = Case(spoiled=spoiled)
    skips = case.choose(max_ppl_increase=limit)
    assert case.increase(set(skips.reasons)) <= limit
    order = worst_first(skips.sensitivity)
    chosen = [unit for unit in order if unit.layers[0] in skips.reasons]
    assert chosen == order[: len(chosen)]
    if chosen:
        assert case.increase({name for unit in chosen[:-1] for name in unit.layers}) > limit


def test_both_limits_together() -> None:
    case = Case(spoiled=("model.layers.0.mlp.down_proj",))
    limit = case.increase({"model.layers.0.mlp.down_proj"}) * 1.01
    few, many, both = (
        case.choose(**settings)
        for settings in ({"max_ppl_increase": limit}, {"auto_skip": 8}, {"max_ppl_increase": limit, "auto_skip": 8})
    )
    assert few.reasons
    assert both.reasons == few.reasons | many.reasons


@pytest.mark.parametrize("scheme", ["int8-static", "fp8-static"])
def test_a_static_scale_that_does_not_fit_is_replaced_by_one_per_token(scheme: str) -> None:
    spoiled = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    by = "input" if scheme == "int8-static" else "weight"
    case = Case(scheme, spoiled, by)
    skips = case.choose(auto_skip=2)
    if by == "weight":  # for which no other scale of the input makes up
        assert set(skips.reasons) == set(spoiled)
        assert not skips.dynamic
        return
    assert not skips.reasons
    assert set(skips.dynamic) == set(spoiled)
    for name, layer in skips.dynamic.items():
        original = case.layers[name]
        assert layer.scheme == original.scheme.per_token
        assert layer.input_scale is None
        assert original.input_scale is not None
        assert layer.weight is original.weight
        x = torch.randn(3, 64)
        assert torch.equal(layer(x), quantize_linear(case.model.get_submodule(name), None, layer.scheme)(x))


def test_a_static_recipe_stays_within_its_limit() -> None:
    """Also where the remedy of a layer is a scale per token, which still costs something."""
    case = Case("int8-static", ("model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.o_proj"), "input")
    for limit in (1e-5, 1e-4, 1e-3, 0.01):
        skips = case.choose(max_ppl_increase=limit)
        layers = case.layers | skips.dynamic
        with swapped(case.model, {name: layers[name] for name in layers.keys() - skips.reasons.keys()}):
            now = log_likelihood(case.model, BATCHES)
        assert math.expm1(log_likelihood(case.model, BATCHES) - now) <= limit


def test_the_model_is_left_alone() -> None:
    case = Case("int8-static", ("model.layers.0.mlp.gate_proj",), "input")
    modules = list(case.model.modules())
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    case.choose(auto_skip=4, max_ppl_increase=1e-3)
    assert all(a is b for a, b in zip(case.model.modules(), modules, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())


def test_only_some_tokens_are_measured_on_and_one_batch_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    make = Sensitivity.__init__

    def note(self: Sensitivity, structure: Structure, batches: list[Tensor]) -> None:
        measured[:] = [len(ids) * ids.shape[1] for ids in batches]
        make(self, structure, batches)

    monkeypatch.setattr(Sensitivity, "__init__", note)
    case = Case()
    case.units = case.units[:1]
    for shapes, wanted in (([(1, 100)] * 15, 10), ([(12, 120)], 1), ([(9, 120), (1, 5)], 1), ([(1, 5)], 1)):
        case.choose(batches=[tiny.token_ids(*shape) for shape in shapes], auto_skip=1)
        assert len(measured) == wanted
        assert sum(measured[1:]) <= MOST_TOKENS


def test_measurements_are_taken_from_the_search_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, state = Case(), SearchState(tmp_path)
    expected = case.choose(auto_skip=4)
    count, measure = [0], Sensitivity.kl

    def interrupted(self: Sensitivity, unit: Unit, layers: dict[str, W8A8Linear]) -> float:
        if count[0] == 4:
            raise KeyboardInterrupt
        count[0] += 1
        return measure(self, unit, layers)

    monkeypatch.setattr(Sensitivity, "kl", interrupted)
    with pytest.raises(KeyboardInterrupt):
        case.choose(state, auto_skip=4)
    stored = state.read(MEASUREMENTS)
    assert stored is not None
    assert len(stored[1]) == 4
    count[0] = 4 - (len(case.units) - 4)  # so many may still be measured
    assert case.choose(state, auto_skip=4) == expected
    assert case.choose(state, auto_skip=4) == expected
