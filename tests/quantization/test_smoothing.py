"""Smoothing: the formula and its guards, folds that preserve the function, and wrong folds that are caught."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from tiny import logits, relative_error
from torch import Tensor, nn

from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.probing.smoothing_groups import Group, discover
from smoothquant_ext.probing.structure import Structure, find_structure
from smoothquant_ext.quantization import smoothing as smoothing_module
from smoothquant_ext.quantization.calibration import calibrate
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.quantization.smoothing import Proof, column_absmax, fold_, group_modules, smoothing_scale
from smoothquant_ext.reporting.outliers import smooth_
from smoothquant_ext.scheme import SCHEMES

ARCHITECTURES = sorted(tiny.CONFIGS)


IDS = tiny.token_ids()


def prepare(model: nn.Module) -> tuple[Structure, list[Group], dict[str, Tensor]]:
    structure = find_structure(model, IDS)
    return structure, discover(structure).groups, measure(structure)


def measure(structure: Structure) -> dict[str, Tensor]:
    return calibrate(structure.model, select_linears(structure, Recipe()).modules(structure.model), [IDS])


def test_formula() -> None:
    x, w = torch.tensor([16.0, 4.0, 1.0]), torch.tensor([1.0, 4.0, 16.0])
    assert smoothing_scale(x, w, 0.5).tolist() == pytest.approx([4.0, 1.0, 0.25])
    assert smoothing_scale(x, w, 1.0).tolist() == pytest.approx([16.0, 4.0, 1.0])
    assert smoothing_scale(x, w, 0.0).tolist() == pytest.approx([1.0, 0.25, 1 / 16])


def test_column_absmax_is_relative_to_the_row_only_where_rows_have_their_own_scale() -> None:
    weight = torch.tensor([[1.0, -2.0, 4.0], [100.0, 10.0, 0.0], [0.0, 0.0, 0.0]])
    assert column_absmax(weight, SCHEMES["int8"]).tolist() == [1.0, 0.5, 1.0]
    assert column_absmax(weight, SCHEMES["fp8-static"]).tolist() == [100.0, 10.0, 4.0]
    assert weight[1, 0] == 100.0


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_scale_is_finite_and_positive_whatever_comes(alpha: float) -> None:
    values = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1e30, 3e38, float("inf"), float("nan")])
    s = smoothing_scale(*torch.cartesian_prod(values, values).T, alpha)
    assert bool((torch.isfinite(s) & (s > 0)).all())
    assert smoothing_scale(torch.zeros(1), torch.ones(1), alpha).item() == 1.0
    assert smoothing_scale(torch.ones(1), torch.zeros(1), alpha).item() == 1.0


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_function_is_preserved(model_type: str) -> None:
    model = tiny.build(model_type).double()  # the fold itself is exact algebra: fp64 shows it
    model.set_experts_implementation("eager")  # which has an fp64 kernel
    structure, groups, absmax = prepare(model)
    before = logits(model, IDS)
    smoothing = smooth_(structure, groups, absmax, Recipe(alpha=0.5))
    assert not smoothing.failed
    assert len(smoothing.groups) == len(groups)
    assert relative_error(model, before, IDS) < 1e-5  # fp32 inside norms and softmax
    assert any(group.outlier_after != group.outlier_before for group in smoothing.groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_function_is_preserved_in_16_bits_within_rounding(dtype: torch.dtype) -> None:
    model = tiny.build("gemma", dtype)
    structure, groups, absmax = prepare(model)
    before = logits(model, IDS)
    smoothing = smooth_(structure, groups, absmax, Recipe(alpha=0.5))
    assert not smoothing.failed
    # Each weight is rounded once more: eps / 2 in every factor of a dozen layers, which add up like a random walk.
    assert relative_error(model, before, IDS) < 12 * torch.finfo(dtype).eps


def test_absmax_follows_the_fold() -> None:
    """The statistics that smoothing hands on are those of the smoothed model."""
    model = tiny.build("llama")
    structure, groups, absmax = prepare(model)
    smooth_(structure, groups, absmax, Recipe(alpha=0.7))
    measured = measure(structure)
    for name in measured:
        torch.testing.assert_close(absmax[name], measured[name], rtol=1e-4, atol=1e-5)


def test_amplified_outliers_are_smoothed_away() -> None:
    model = tiny.build("llama")
    tiny.amplify_outliers(model)
    structure, groups, absmax = prepare(model)
    for group in smooth_(structure, groups, absmax, Recipe(alpha=0.5)).groups:
        if group.kind == "norm":
            assert group.outlier_before > 20
            assert group.outlier_after < group.outlier_before / 3


def wrong_map(group: Group) -> Group:
    consumers = {name: channels.roll(1) for name, channels in group.consumers.items()}
    return dataclasses.replace(group, consumers=consumers)


def wrong_offset(group: Group) -> Group:
    return dataclasses.replace(group, norm_offset=1.0 - group.norm_offset)


def missing_consumer(group: Group) -> Group:
    return dataclasses.replace(group, consumers=dict(list(group.consumers.items())[1:]))


@pytest.mark.parametrize("spoil", [wrong_map, wrong_offset, missing_consumer])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_fold_is_caught_undone_and_reported(spoil, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    model = tiny.build("llama", dtype)
    tiny.amplify_outliers(model)
    structure, groups, absmax = prepare(model)
    culprit = groups[0]
    assert culprit.kind == "norm"
    reference = tiny.build("llama", dtype)
    tiny.amplify_outliers(reference)
    smooth_(find_structure(reference, IDS), groups[1:], dict(absmax), Recipe(alpha=0.5))

    smoothing = smooth_(structure, [spoil(culprit), *groups[1:]], absmax, Recipe(alpha=0.5))

    assert set(smoothing.failed) == {culprit.producer}
    assert "changes the block's output" in smoothing.failed[culprit.producer]
    assert {group.producer for group in smoothing.groups} == {group.producer for group in groups[1:]}
    for (name, value), expected in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_proof_undoes_its_own_copy() -> None:
    model = tiny.build("llama")
    structure, groups, _ = prepare(model)
    proof = Proof(structure.blocks[groups[0].block])
    before = {name: value.clone() for name, value in proof.module.state_dict().items()}
    assert proof.try_fold(wrong_map(groups[0]), torch.linspace(0.5, 2, 64))
    assert all(torch.equal(value, before[name]) for name, value in proof.module.state_dict().items())
    assert proof.try_fold(groups[0], torch.linspace(0.5, 2, 64)) == ""


def test_fold_that_overflows_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llama", torch.float16)
    structure, groups, absmax = prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for scale in (1e6, 1e-6):
        monkeypatch.setattr(smoothing_module, "smoothing_scale", lambda x, w, a, scale=scale: x * 0 + scale)
        smoothing = smooth_(structure, groups, absmax, Recipe(alpha=1.0))
        assert set(smoothing.failed) == {group.producer for group in groups}
        assert all("overflows" in reason for reason in smoothing.failed.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fold_and_its_inverse_cancel() -> None:
    model = tiny.build("gpt2").double()
    structure = find_structure(model, IDS)
    for group in discover(structure).groups:
        producer, consumers = group_modules(structure.blocks[group.block], group)
        channels = max(int(m.max()) for m in group.consumers.values()) + 1
        width = producer.weight.numel() if producer.weight.dim() == 1 else producer.weight.shape[1]
        s = torch.ones(width)
        s[:channels] = torch.linspace(0.25, 4, channels)
        before = {name: p.clone() for name, p in model.named_parameters()}
        fold_(producer, consumers, group, s)
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        fold_(producer, consumers, group, 1 / s)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, before[name], rtol=1e-6, atol=1e-9)


def test_groups_without_a_quantized_consumer_are_left_alone() -> None:
    model = tiny.build("llama")
    structure, groups, absmax = prepare(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = {name: value for name, value in absmax.items() if name.endswith("down_proj")}
    smoothing = smooth_(structure, groups, kept, Recipe(alpha=0.5))
    assert {group.producer.rpartition(".")[2] for group in smoothing.groups} == {"up_proj"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".layers.")[2][2:] for name in changed} == {"mlp.up_proj.weight", "mlp.down_proj.weight"}
    assert set(find_linears(model)) >= set(kept)
