"""The algorithm as a whole, on tiny models of many architectures with real kernels."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import tiny
import torch
from tiny_blocks import ExpertBlock, InPlaceBlock, PairBlock, Stack, batches
from torch import Tensor, nn

from smoothquant_ext.calibrate import calibrate
from smoothquant_ext.discover import discover
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluate import evaluate
from smoothquant_ext.linears import select_linears, weight_nk
from smoothquant_ext.modules import W8A8Linear
from smoothquant_ext.quantize import Report, quantize
from smoothquant_ext.scheme import SCHEMES, Recipe
from smoothquant_ext.smooth import Proof, smooth_

CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def relative_error(model: nn.Module, expected: Tensor, ids: Tensor) -> float:
    return float((logits(model, ids) - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_architecture_runs_in_8_bits(model_type: str) -> None:
    model = tiny.build(model_type)
    ids = tiny.token_ids(seed=9)
    expected = logits(model, ids)
    quantized = quantize(model, CALIBRATION, progress=False)
    assert quantized is model
    report: Report = model.smoothquant_report
    assert report.quantized
    # Nothing fails the proof; the norm before a router and experts is read by these too.
    assert all("is also read by something other than" in reason for reason in report.failed.values())
    assert all(isinstance(model.get_submodule(name), W8A8Linear) for name in report.quantized)
    # 8 bits leave about 1 % per layer; an untrained model of two blocks does not shrink it.
    assert relative_error(model, expected, ids) < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_smoothing_helps_where_there_are_outliers(scheme: str) -> None:
    ids = tiny.token_ids(seed=9)
    errors = {}
    for smooth in (False, True):
        model = tiny.build("llama")
        tiny.amplify_outliers(model, factor=300.0)
        expected = logits(model, ids)
        quantize(model, CALIBRATION, Recipe(scheme, smooth=smooth), progress=False)
        errors[smooth] = relative_error(model, expected, ids)
    if SCHEMES[scheme].dtype == torch.int8:
        assert errors[True] < errors[False] / 2
    else:  # floating-point formats carry outliers by themselves: smoothing must not hurt
        assert errors[True] < errors[False] * 1.25


def test_static_scales_are_shared_by_layers_that_share_an_input() -> None:
    model = quantize(tiny.build("llama"), CALIBRATION, Recipe("int8-static"), progress=False)
    for layer in model.model.layers:
        q, k, v = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        assert torch.equal(q.input_scale, k.input_scale)
        assert torch.equal(q.input_scale, v.input_scale)
        assert torch.equal(layer.mlp.gate_proj.input_scale, layer.mlp.up_proj.input_scale)


def test_report() -> None:
    model = quantize(tiny.build("gpt2"), CALIBRATION, Recipe(skip=("h.0.mlp.c_fc",)), progress=False)
    report: Report = model.smoothquant_report
    assert report.skipped == {"lm_head": "output embedding", "transformer.h.0.mlp.c_fc": "skipped by pattern"}
    assert "transformer.h.0.mlp.c_fc" not in report.quantized
    assert report.unsmoothed == ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]  # behind GELU
    assert {group.producer for group in report.groups} >= {"transformer.h.0.ln_1", "transformer.h.1.ln_2"}
    assert set(report.seconds) == {"Calibrating", "Finding smoothing groups", "Quantizing blocks"}


def test_batches_may_be_a_tensor_a_list_or_a_generator() -> None:
    ids = tiny.token_ids(rows=4, seed=3)
    outputs = []
    for form in (ids, list(ids.split(1)), (row for row in ids.split(1))):
        model = quantize(tiny.build("llama"), form, progress=False)
        outputs.append(logits(model, tiny.token_ids(seed=9)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    "batches", [[], torch.empty(0, 8, dtype=torch.int64), iter(())], ids=["list", "tensor", "iterator"]
)
def test_no_calibration_data(batches: object) -> None:
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(SmoothQuantError, match="there is no calibration batch"):
        quantize(model, batches, progress=False)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_never_runs_stays_as_it_is() -> None:
    model = tiny.build("llama")
    model.model.layers[0].idle = nn.Linear(64, 64)
    quantize(model, CALIBRATION, progress=False)
    assert model.smoothquant_report.skipped["model.layers.0.idle"] == "never ran during calibration"
    assert isinstance(model.model.layers[0].idle, nn.Linear)


def test_no_float_weight_is_left_behind() -> None:
    model = quantize(tiny.build("llama"), CALIBRATION, progress=False)
    for name, parameter in model.named_parameters():
        assert "proj" not in name, f"{name} is still a float parameter of {tuple(parameter.shape)}"


class Tuned(NamedTuple):
    """A model that runs, and its data."""

    model: nn.Module
    data: list[Tensor]


def with_dead_parts() -> nn.Module:
    model = Stack()
    with torch.no_grad():
        for block in model.layers:
            block.norm.weight[3] = block.norm.bias[3] = 0  # a dead channel of up
            block.up.weight[5] = 0  # a row of zeros, and behind the ReLU a dead channel of down
            block.up.bias[5] = -1
    return model


def with_experts(calls_empty: bool, lonely: int) -> Tuned:
    """The second expert has tokens in one window alone."""
    model = Stack(make=lambda: ExpertBlock(calls_empty), blocks=1, order=(0,))
    positive = model.embed.weight[:, 0] > 0
    ids = torch.arange(tiny.VOCAB)
    data = [ids[~positive][None, start : start + 6] for start in range(6)]
    data[lonely] = torch.cat([ids[positive][None, :4], ids[~positive][None, :3]], 1)
    return Tuned(model, data)


HOSTILE = {
    "plain": lambda: Tuned(Stack(), batches(5)),
    "one window": lambda: Tuned(Stack(), batches(1)),
    "one token": lambda: Tuned(Stack(), batches(5, tokens=1)),
    "windows of many sizes": lambda: Tuned(Stack(), [tiny.token_ids(1 + n % 3, 1 + 5 * n) for n in range(6)]),
    "multiplied between": lambda: Tuned(Stack(between=lambda x: x * 1.5), batches(5)),
    "multiplied in place between": lambda: Tuned(Stack(between=lambda x: x.mul_(1.5)), batches(5)),
    "two tensors": lambda: Tuned(Stack(make=PairBlock), batches(5)),
    "changed in place": lambda: Tuned(Stack(make=InPlaceBlock), batches(5)),
    "twice in a row": lambda: Tuned(Stack(order=(0, 0, 1, 2)), batches(5)),
    "round and round": lambda: Tuned(Stack(order=(0, 1, 2, 0, 1, 2)), batches(5)),
    "in another order": lambda: Tuned(Stack(order=(2, 0, 1)), batches(5)),
    "one idle": lambda: Tuned(Stack(order=(0, 2)), batches(5)),
    "one rarely": lambda: Tuned(Stack(order=lambda ids: (0, 1, 2) if ids[0, 0] % 2 else (0, 2)), batches(5)),
    "dead parts": lambda: Tuned(with_dead_parts(), batches(5)),
    "16 bits": lambda: Tuned(Stack().bfloat16(), batches(5)),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("recipe", [
    Recipe(alpha="auto"), Recipe("int8-static", alpha="auto", auto_skip=2), Recipe(explicit=True),
    Recipe("fp8", rounding="gptq", smooth=False), Recipe("fp8-static", clipping="kl", max_ppl_increase=0.5),
], ids=["auto", "static", "explicit", "gptq", "kl"])  # fmt: skip
def test_tuned_recipes_on_hostile_models(kind: str, recipe: Recipe) -> None:
    assert_close_in_8_bits(*HOSTILE[kind](), recipe)


def assert_close_in_8_bits(model: nn.Module, data: list[Tensor], recipe: Recipe) -> None:
    with torch.no_grad():
        expected = [model(ids).double() for ids in data]
        quantize(model, data, recipe, progress=False)
        report: Report = model.smoothquant_report
        assert report.quantized
        assert all("did not run while probing" in reason for reason in report.failed.values())
        for name in report.quantized:
            assert isinstance(model.get_submodule(name), W8A8Linear)
        for ids, want in zip(data, expected, strict=True):
            error = float((model(ids).double() - want).norm() / want.norm())
            # Three bits behind the point: 2^-4 relative for each of two factors, static scales and bf16 beside it.
            assert error < (0.05 if recipe.resolved_scheme.dtype == torch.int8 else 0.15)
    assert all(0 < damage < 0.05 for damage in report.damages.values())


@pytest.mark.parametrize("lonely", [1, 4])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(smooth=False),
        Recipe("int8-static", smooth=False, rounding="gptq", clipping="auto", auto_skip=1),
        Recipe(),
    ],
    ids=["plain", "tuned", "smooth"],
)
def test_an_expert_that_is_called_in_one_window_alone(lonely: int, recipe: Recipe) -> None:
    """A held-out one or not."""
    assert_close_in_8_bits(*with_experts(False, lonely), recipe)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("int8-static", alpha="auto")], ids=["plain", "tuned"])
def test_an_expert_that_is_called_with_no_row(recipe: Recipe) -> None:
    assert_close_in_8_bits(*with_experts(True, 1), recipe)


AMPLIFIED = {
    "llama": tiny.LLAMA_NORMS,
    "gpt2": {"ln_1": ("c_attn",), "ln_2": ("c_fc",)},
    "bloom": {"input_layernorm": ("query_key_value",), "post_attention_layernorm": ("dense_h_to_4h",)},
}


def amplified(architecture: str, factor: float = 100.0) -> nn.Module:
    model = tiny.build(architecture)
    tiny.amplify_outliers(model, factor, groups=AMPLIFIED[architecture])
    return model


@pytest.mark.parametrize("architecture", AMPLIFIED)
@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8-static"])
def test_a_searched_alpha_damages_less_than_the_default(architecture: str, scheme: str) -> None:
    """What is searched for is what is measured in the end where there is one window for both, and no other rounding."""
    damages = {}
    for alpha in ("auto", None):
        recipe = Recipe(scheme, alpha=alpha, rounding="nearest", clipping="absmax")
        report = quantize(amplified(architecture), CALIBRATION[:1], recipe, progress=False).smoothquant_report
        damages[alpha] = report.damages
        assert len(report.damages) == 2
    assert sum(damages["auto"].values()) < sum(damages[None].values())


def hessians(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, Tensor]:
    """fp64 [K, K] of each layer's inputs."""
    sums = dict.fromkeys(names, 0)

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().double().flatten(0, -2)
        sums[name] = sums[name] + rows.T @ rows

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: add(name, args[0]))
        for name in names
    ]
    for ids in data:
        logits(model, ids)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("architecture", AMPLIFIED)
@pytest.mark.parametrize("explicit", [False, True])
def test_gptq_sees_the_inputs_that_smoothing_leaves(architecture: str, explicit: bool) -> None:
    """In the exact objective over the windows that are not held out, each layer beats rounding to nearest."""
    data = [tiny.token_ids(2, 24, seed) for seed in range(8)]
    layers = {}
    for rounding in ("nearest", "gptq"):
        recipe = Recipe(alpha=0.5, rounding=rounding, explicit=explicit)
        model = quantize(amplified(architecture), data, recipe, progress=False)
        layers[rounding] = {name: model.get_submodule(name) for name in model.smoothquant_report.quantized}
    folded = amplified(architecture)
    absmax = calibrate(folded, select_linears(folded, Recipe()).linears, data)
    smooth_(folded, discover(folded, data[0]).groups, absmax, data[0], Recipe(alpha=0.5))
    seen = hessians(folded, list(absmax), [ids for index, ids in enumerate(data) if index % 4])
    for name, layer in layers["gptq"].items():
        losses = {}
        for rounding in layers:
            other = layers[rounding][name]
            value = other.plain_weight().double() * other.weight_scale.double()
            if other.smooth is not None:
                assert explicit
                value = value / other.smooth.double()
            error = value - weight_nk(folded.get_submodule(name)).double()
            losses[rounding] = float(((error @ seen[name]) * error).sum())
        assert losses["gptq"] < losses["nearest"], name
        assert layer.weight_scale.shape == (layer.out_features, 1)


def read_by(name: str, model: nn.Module, factor: float = 200.0) -> None:
    """Makes a few channels of what layers read that no norm can be folded for ``factor`` times larger."""
    with torch.no_grad():
        if name == "olmo2":  # whose q, k and v read the residual stream itself
            model.model.embed_tokens.weight[:, :3] *= factor
            for layer in model.model.layers:
                for reader in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    reader.weight[:, :3] /= factor
                for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    reader.weight[:, :3] /= factor
        for layer in model.transformer.h if name in ("gpt2", "bloom") else ():
            mlp = layer.mlp
            if name == "gpt2":
                mlp.c_fc.weight[:, :3] *= factor
                mlp.c_proj.weight[:3] /= factor
            else:
                mlp.dense_h_to_4h.weight[:3] *= factor
                mlp.dense_4h_to_h.weight[:, :3] /= factor


EXPLICIT = {
    "gpt2": {"mlp.c_proj"},
    "bloom": {"mlp.dense_4h_to_h"},
    "olmo2": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"},
}


@pytest.mark.parametrize("architecture", EXPLICIT)
@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_explicit_smoothing(architecture: str, alpha: float | str, scheme: str) -> None:
    ids = tiny.token_ids(seed=9)
    errors, damages = {}, {}
    for explicit in (False, True):
        model = tiny.build(architecture)
        read_by(architecture, model)
        expected = logits(model, ids)
        recipe = Recipe(scheme, alpha=alpha, explicit=explicit, rounding="nearest", clipping="absmax")
        quantize(model, CALIBRATION, recipe, progress=False)
        report: Report = model.smoothquant_report
        errors[explicit] = relative_error(model, expected, ids)
        damages[explicit] = sum(report.damages.values())
        divided = {name for name in report.quantized if model.get_submodule(name).smooth is not None}
        groups = [group for group in report.groups if group.kind == "explicit"]
        assert divided == {name for group in groups for name in group.consumers}
        if not explicit:
            assert not divided
            continue
        wanted = {name for name in report.quantized if any(name.endswith(end) for end in EXPLICIT[architecture])}
        assert divided == wanted
        assert not set(report.unsmoothed) & divided
        for group in groups:
            assert group.producer == ""
            assert group.outlier_after < group.outlier_before
            first, *others = (model.get_submodule(name) for name in group.consumers)
            assert all(torch.equal(other.smooth, first.smooth) for other in others)
    assert errors[True] < errors[False] / 3
    assert damages[True] < damages[False] / 3


def with_massive_token(token: int = 5) -> nn.Module:
    """Whose first block gives one token, and no other, a huge value behind its ReLU."""
    model = Stack()
    block = model.layers[0]
    with torch.no_grad():
        towering = block.norm(model.embed.weight[token])
        block.up.weight[0] = towering * 1e3
        block.up.bias[0] = -0.9e3 * float(towering @ towering)
    return model


@pytest.mark.parametrize("clipping", ["absmax", "auto", "mse"])
@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_massive_tokens_are_reported_and_get_scales_of_their_own(clipping: str, scheme: str) -> None:
    data = [ids.masked_fill(ids == 5, 6) for ids in batches(5, rows=2)]
    for ids in data:
        ids[1, 4] = 5
    model = quantize(with_massive_token(), data, Recipe(scheme, clipping=clipping), progress=False)
    report: Report = model.smoothquant_report
    assert set(report.massive) == {"layers.0.down"}
    ratio, position = report.massive["layers.0.down"]
    assert ratio > 1000
    assert position == 4
    is_static = {name: model.get_submodule(name).input_scale is not None for name in report.quantized}
    own = scheme == "int8-static" and clipping != "absmax"
    assert is_static == {name: scheme == "int8-static" and not (own and name in report.massive) for name in is_static}
    assert report.per_token == (["layers.0.down"] if own else [])
    assert ("layers.0.down" in report.limits) is False
    assert own or not report.limits


def test_a_limit_is_not_kept_when_the_fold_it_was_chosen_under_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proof, "try_fold", lambda *_: "it does not hold")
    model = amplified("llama")
    quantize(model, CALIBRATION, Recipe("int8-static", alpha="auto", rounding="nearest"), progress=False)
    report: Report = model.smoothquant_report
    assert report.failed
    reference = quantize(amplified("llama"), CALIBRATION, Recipe("int8-static", smooth=False), progress=False)
    groups = discover(amplified("llama"), CALIBRATION[0]).groups
    smoothable = {name for group in groups for name in group.consumers}
    for name in smoothable - report.limits.keys():
        assert torch.equal(model.get_submodule(name).input_scale, reference.get_submodule(name).input_scale)
    assert {name for name in report.quantized if name.endswith("q_proj")} & smoothable - report.limits.keys()


@pytest.mark.parametrize("clipping", ["auto", "mse", "percentile", "kl"])
def test_a_block_that_runs_again_on_larger_values_keeps_its_range(clipping: str) -> None:
    """Limits are chosen by what was recorded, which is its first run alone."""
    layers = []
    for chosen in ("absmax", clipping):
        model = Stack(make=InPlaceBlock, blocks=2, order=(0, 0, 0, 1), between=lambda x: x * 5)
        quantize(model, batches(8), Recipe("int8-static", clipping=chosen, smooth=False), progress=False)
        layers.append(model.layers[0])
        assert not any(name.startswith("layers.0") for name in model.smoothquant_report.limits)
    for name in ("first", "second"):
        assert torch.equal(*(layer.get_submodule(name).input_scale for layer in layers))


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_layers_are_left_out(scheme: str) -> None:
    model = amplified("llama", 1000.0)
    recipe = Recipe(scheme, smooth=False, auto_skip=0.5)
    quantize(model, CALIBRATION, recipe, progress=False)
    report: Report = model.smoothquant_report
    left_out = {name for name, reason in report.skipped.items() if "KL divergence" in reason}
    assert len(left_out) <= 7
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in left_out)
    assert len(report.quantized) + len(left_out) == 14
    assert all(isinstance(model.get_submodule(name), W8A8Linear) for name in report.quantized)
    assert sorted(name for layers in report.sensitivity for name in layers) == sorted([*report.quantized, *left_out])
    for layers in report.sensitivity:
        assert len({name in left_out for name in layers}) == 1
    kept = [kl / len(layers) for layers, kl in report.sensitivity.items() if layers[0] in report.quantized]
    gone = [kl / len(layers) for layers, kl in report.sensitivity.items() if layers[0] in left_out]
    remedied = [name for name in report.quantized if model.get_submodule(name).input_scale is None]
    if scheme == "int8":
        assert min(gone) > min(kept)
    else:
        assert 0 < len(remedied) < len(report.quantized)
        assert len(remedied) + len(left_out) <= 7


def likely_text(model: nn.Module, windows: int, rows: int = 2, tokens: int = 24) -> list[Tensor]:
    """What the model itself says, so that any damage makes it less likely."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny.VOCAB, (windows * rows, 1), generator=generator)
    while ids.shape[1] < tokens:
        next_ids = torch.multinomial((2 * logits(model, ids)[:, -1]).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, next_ids], 1)
    return list(ids.split(rows))


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize("limit", [1e-3, 0.01])
def test_the_perplexity_of_held_out_text_stays_within_its_limit(scheme: str, limit: float) -> None:
    original = amplified("llama", 1000.0)
    data = likely_text(original, 8)
    held_out = torch.cat([data[0], data[4]])
    model = quantize(amplified("llama", 1000.0), data, Recipe(scheme, smooth=False, max_ppl_increase=limit), False)
    unlimited = quantize(amplified("llama", 1000.0), data, Recipe(scheme, smooth=False), False)
    change = evaluate(model, held_out, original).change
    assert change is not None
    assert change <= limit + 1e-5  # fused, the model rounds in other places
    assert change < evaluate(unlimited, held_out, original).change
    assert model.smoothquant_report.quantized
