"""What the algorithm searches for: alpha, rounding, ranges, explicit scales, layers to leave out."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import logits, relative_error
from torch import Tensor, nn

from smoothquant_ext.evaluation.accuracy import evaluate
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.linears import weight_nk
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.calibration import calibrate
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.report import Report
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.quantization.smoothing import Proof
from smoothquant_ext.reporting.outliers import smooth_

CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]
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
def test_a_searched_alpha_errs_less_than_the_default(architecture: str, scheme: str) -> None:
    """What is searched for is what is measured in the end where there is one window for both, and no other rounding."""
    errors = {}
    for alpha in ("auto", None):
        recipe = Recipe(scheme, alpha=alpha, rounding="nearest", clipping="absmax")
        report = quantize(amplified(architecture), CALIBRATION[:1], recipe, progress=False).smoothquant_report
        errors[alpha] = sum(block.error for block in report.blocks.values())
        assert len(report.blocks) == 2
    assert errors["auto"] < errors[None]


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
    structure = find_structure(folded, data[0])
    absmax = calibrate(folded, select_linears(structure, Recipe()).linears, data)
    smooth_(structure, discover(structure).groups, absmax, Recipe(alpha=0.5))
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
    errors, block_errors = {}, {}
    for explicit in (False, True):
        model = tiny.build(architecture)
        read_by(architecture, model)
        expected = logits(model, ids)
        recipe = Recipe(scheme, alpha=alpha, explicit=explicit, rounding="nearest", clipping="absmax")
        quantize(model, CALIBRATION, recipe, progress=False)
        report: Report = model.smoothquant_report
        errors[explicit] = relative_error(model, expected, ids)
        block_errors[explicit] = sum(block.error for block in report.blocks.values())
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
    assert block_errors[True] < block_errors[False] / 3


def test_a_limit_is_not_kept_when_the_fold_it_was_chosen_under_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Proof, "try_fold", lambda *_: "it does not hold")
    model = amplified("llama")
    quantize(model, CALIBRATION, Recipe("int8-static", alpha="auto", rounding="nearest"), progress=False)
    report: Report = model.smoothquant_report
    assert report.failed
    reference = quantize(amplified("llama"), CALIBRATION, Recipe("int8-static", smooth=False), progress=False)
    groups = discover(find_structure(amplified("llama"), CALIBRATION[0])).groups
    smoothable = {name for group in groups for name in group.consumers}
    limited = {name for name, layer in report.layers.items() if layer.limit is not None}
    for name in smoothable - limited:
        assert torch.equal(model.get_submodule(name).input_scale, reference.get_submodule(name).input_scale)
    assert {name for name in report.quantized if name.endswith("q_proj")} & smoothable - limited


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
    assert sorted(name for unit in report.sensitivity for name in unit.layers) == sorted([*report.quantized, *left_out])
    for unit in report.sensitivity:
        assert len({name in left_out for name in unit.layers}) == 1
    kept = [unit.kl / len(unit.layers) for unit in report.sensitivity if unit.layers[0] in report.quantized]
    gone = [unit.kl / len(unit.layers) for unit in report.sensitivity if unit.layers[0] in left_out]
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
