"""Selection: what counts as a linear layer, which ones a recipe quantizes, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.probing.linears import find_linears, is_linear, weight_nk
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.selection import check_finite_weights, select_linears
from smoothquant_ext.scheme import SCHEMES


class RenamedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.T + self.bias


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


def test_subclasses_count_if_they_compute_the_same() -> None:
    assert is_linear(nn.Linear(4, 3))
    assert is_linear(RenamedLinear(4, 3))
    assert not is_linear(ScaledLinear(4, 3))
    assert not is_linear(nn.Embedding(4, 3))


def test_conv1d_weight_is_seen_as_n_by_k() -> None:
    linear = tiny.build("gpt2").transformer.h[0].attn.c_attn
    assert weight_nk(linear).shape == (192, 64)
    weight_nk(linear).zero_()
    assert not linear.weight.any()


def test_defaults_leave_head_and_routers_alone() -> None:
    selection = select_linears(find_structure(tiny.build("llama"), tiny.token_ids()), Recipe())
    assert len(selection.linears) == 14
    assert selection.skipped == {"lm_head": "output embedding"}
    mixtral = select_linears(find_structure(tiny.build("mixtral"), tiny.token_ids()), Recipe())
    others = {name.rpartition(".")[2] for name, reason in mixtral.skipped.items() if "not a linear layer" in reason}
    assert others == {"gate"}  # the router has a matrix, and a forward of its own
    assert all("self_attn" in name for name in mixtral.linears)
    assert set(mixtral.experts) == {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}


@pytest.mark.parametrize("pattern", ["down_proj", "*.down_proj", "mlp.down_proj", "model.layers.*.mlp.down_proj"])
def test_patterns_match_whole_parts_of_names(pattern: str) -> None:
    model = tiny.build("llama")
    skipped = select_linears(find_structure(model, tiny.token_ids()), Recipe(skip=(pattern,))).skipped
    assert {name for name, reason in skipped.items() if "pattern" in reason} == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert set(select_linears(find_structure(model, tiny.token_ids()), Recipe(only=(pattern,))).linears) == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }


@pytest.mark.parametrize("option", ["skip", "only"])
@pytest.mark.parametrize("pattern", ["down", "nothing.*", "", "model.layers.7.*"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str, pattern: str) -> None:
    with pytest.raises(SmoothQuantError, match=f"--{option} pattern .* matches no linear layer; names look like model"):
        select_linears(find_structure(tiny.build("llama"), tiny.token_ids()), Recipe(**{option: (pattern,)}))  # type: ignore[arg-type]


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(SmoothQuantError, match="has no linear layer to quantize"):
        select_linears(find_structure(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), tiny.token_ids()), Recipe())
    with pytest.raises(SmoothQuantError, match=r"to quantize: all 15 are left out; model\.layers\.0\..*q_proj: "):
        select_linears(find_structure(tiny.build("llama"), tiny.token_ids()), Recipe(skip=("*",)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_non_finite_weight_is_named(kind: str, value: float) -> None:
    model = tiny.build("qwen2")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn.k_proj, kind).view(-1)[3] = value
    with pytest.raises(SmoothQuantError, match=rf"model.layers.1.self_attn.k_proj.{kind} holds 1 non-finite"):
        check_finite_weights(find_linears(model))


def test_large_finite_weights_are_not_mistaken_for_infinities() -> None:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.fill_(3e38)
    check_finite_weights({"big": linear})


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(SmoothQuantError, match="expected a number between 0 and 1"):
        Recipe(alpha=alpha)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounding": "up"}, "rounding is 'up', expected one of nearest, clip, gptq"),
        ({"clipping": "none"}, "clipping is 'none', expected one of absmax, percentile"),
        ({"auto_skip": 1.5}, "auto_skip is 1.5, expected a number of layers or a share below 1"),
        ({"auto_skip": -1}, "auto_skip is -1, expected"),
        ({"max_ppl_increase": 0.0}, "max_ppl_increase is 0.0, expected a number above 0"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        Recipe(**settings)


def test_recipe_resolves_names_and_defaults() -> None:
    with pytest.raises(SmoothQuantError, match="unknown scheme 'int4'"):
        Recipe(scheme="int4")
    for name, scheme in SCHEMES.items():
        assert Recipe(scheme=name).resolved_scheme is scheme
        assert Recipe(scheme=scheme).migration == scheme.alpha
    assert Recipe(alpha=0.25).migration == 0.25
