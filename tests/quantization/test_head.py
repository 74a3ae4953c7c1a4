"""The output embedding in 8 bits: when it is taken, from which data, what it costs, and that it comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tiny
import torch
from tiny_others import OTHERS, build_other
from tiny_w8a8 import assert_same_model, logits
from torch import Tensor, nn

from smoothquant_ext import Recipe, load, quantize, save
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluation.accuracy import log_likelihood
from smoothquant_ext.nn.embedding import W8A8Embedding, shares_head
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.hooks import hooked
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization import head as head_module
from smoothquant_ext.quantization import head_cost
from smoothquant_ext.quantization.calibration import CalibrationData
from smoothquant_ext.quantization.head import HeadQuantizer
from smoothquant_ext.quantization.placement import Placement
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.reporting.tables import render_report

DATA = [tiny.token_ids(1, 24, seed) for seed in range(6)]
HEAD = Recipe(head="8bit")


def made(architecture: str = "llama", recipe: Recipe = HEAD, data: Any = DATA, **overrides: Any) -> Any:
    return quantize(tiny.build(architecture, **overrides), data, recipe, progress=False)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [*((architecture, True) for architecture in tiny.CONFIGS), ("llama", False), ("gpt2", False), ("gemma2", False)],
)
def test_every_architecture_comes_back(architecture: str, tied: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tie_word_embeddings": tied}
    if architecture == "llama4_text" and tied:
        pytest.skip("it asks the embedding's weight for its device: see test_what_the_model_reads_stays")
    if architecture == "mixtral":
        settings["num_experts_per_tok"] = 4  # all: an untrained router wavers, and with it the output leaps
    expected = tiny.logits(tiny.build(architecture, **settings), DATA[0])
    model = made(architecture, **settings)
    head = model.get_output_embeddings()
    assert isinstance(head, W8A8Linear)
    assert shares_head(model) == tied == isinstance(model.get_input_embeddings(), W8A8Embedding)
    assert model.smoothquant_report.head.name in model.smoothquant_report.quantized
    # The head's rows and the embedding's have a scale each, 127 steps to the largest value: of Gaussian values, whose
    # largest of 64 is 2.4 deviations, an error of 2.4 / 127 / sqrt(12), 0.5 %, on each side; beside that of the blocks.
    blocks = tiny.relative_error(made(architecture, Recipe(), **settings), expected, DATA[0])
    assert tiny.relative_error(model, expected, DATA[0]) < 1.5 * blocks + 0.02
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert shares_head(loaded) == tied
    assert_same_model(loaded, model)


def test_a_dtype_that_no_format_stores_with_it() -> None:
    with pytest.raises(SmoothQuantError, match=r"cannot run in 8 bits: .*format 'smoothquant-ext' cannot store scheme"):
        made(recipe=Recipe("fp8-e5m2", head="8bit"))
    assert not isinstance(made(recipe=Recipe("fp8-e5m2", head="auto")).lm_head, W8A8Linear)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static"])
def test_scales_are_the_finest_of_the_dtype(scheme: str, tmp_path: Path) -> None:
    model = made(recipe=Recipe(scheme, head="8bit"), tie_word_embeddings=True)
    head = model.lm_head
    assert (head.scheme.weight, head.scheme.is_static) == ("channel", False)
    assert head.rotate == (64 if scheme.startswith("int8") else 0), "FP8 loses by a rotation"
    assert head.smooth is not None
    assert made(recipe=Recipe(scheme, head="8bit", smooth=False)).lm_head.smooth is None
    save(model, tmp_path / "model")
    assert_same_model(load(tmp_path / "model"), model)


def test_auto_takes_it_by_what_it_costs() -> None:
    recipe = Recipe(head="auto")
    with patch.object(head_module, "MOST_ADDED_KL", 1.0):
        taken = made(recipe=recipe, tie_word_embeddings=True)
    assert shares_head(taken)
    kl = taken.smoothquant_report.head.kl
    assert 0 < kl < 0.1
    with patch.object(head_module, "MOST_ADDED_KL", kl / 2):
        left = made(recipe=recipe, tie_word_embeddings=True)
    assert type(left.get_input_embeddings()) is nn.Embedding
    assert left.lm_head.weight is left.get_input_embeddings().weight
    reason = left.smoothquant_report.skipped["lm_head"]
    assert reason == f"output embedding: in 8 bits it alone costs a KL divergence of {kl:.2g} nats a token"
    assert left.smoothquant_report.head.kl == kl
    assert "lm_head" not in left.smoothquant_report.quantized
    with (
        patch.object(head_module, "MOST_ADDED_KL", math.inf),
        patch.object(head_cost, "mean_kl", lambda p, q: math.nan),
    ):
        assert not shares_head(made(recipe=recipe, tie_word_embeddings=True)), "what cannot be measured"


def test_the_cost_is_that_of_the_head_alone() -> None:
    original, quantized = tiny.build("llama"), made()
    held_out = DATA[0]
    with torch.no_grad():
        x = original.model(held_out).last_hidden_state
        p, q = original.lm_head(x).log_softmax(-1), quantized.lm_head(x).log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    # The report's is a mean over more held-out windows, of which this is one.
    assert quantized.smoothquant_report.head.kl == pytest.approx(kl, rel=1.0)


def test_the_cost_in_16_bits_is_not_that_of_rounding_logits() -> None:
    wide = made().smoothquant_report.head.kl
    narrow = made(dtype=torch.bfloat16).smoothquant_report.head.kl
    assert narrow == pytest.approx(wide, rel=0.25)


def collected(data: list[Tensor]) -> tuple[HeadQuantizer, Any, CalibrationData]:
    model = tiny.build("llama")
    structure = find_structure(model, data[0])
    recipe = Recipe(head="8bit")
    quantizer = HeadQuantizer(structure, recipe, select_linears(structure, recipe))
    given = CalibrationData(model, data)
    with quantizer.collecting(given), torch.no_grad():
        for batch in given:
            model(batch["input_ids"] if isinstance(batch, dict) else batch)
    return quantizer, model, given


@pytest.mark.parametrize("windows", [1, 6])
def test_it_is_rounded_for_windows_that_are_not_held_out(windows: int) -> None:
    quantizer, model, given = collected(DATA[:windows])
    used = [batch for index, batch in enumerate(DATA[:windows]) if index not in given.held_out] or DATA[:1]
    with torch.no_grad():
        rows = torch.cat([model.model(batch).last_hidden_state[0] for batch in used])
    assert quantizer._inputs.absmax is not None
    torch.testing.assert_close(quantizer._inputs.absmax, rows.abs().amax(0))
    hessian = rows.T @ rows
    torch.testing.assert_close(quantizer._inputs.hessian, hessian, rtol=0, atol=1e-5 * float(hessian.abs().max()))


def test_calibration_computes_no_logits_that_nobody_needs() -> None:
    model, tokens = tiny.build("llama"), []

    def note(_name: str, args: Any, _kwargs: Any) -> None:
        tokens.append(args[0].shape[-2])

    data = [tiny.token_ids(1, 40, seed) for seed in range(6)]
    structure = find_structure(model, data[0])
    recipe = Recipe(head="8bit")
    quantizer = HeadQuantizer(structure, recipe, select_linears(structure, recipe))
    given = CalibrationData(model, data)
    with quantizer.collecting(given), hooked({"": model.lm_head}, before=note), torch.no_grad():
        for batch in given:
            model(batch if isinstance(batch, Tensor) else batch["input_ids"])
    assert tokens == [1] * 6


def test_a_model_that_needs_all_its_logits() -> None:
    labelled = [{"input_ids": batch, "labels": batch} for batch in DATA]
    assert torch.equal(logits(made(data=labelled)), logits(made())), "the loss compares them with the labels"


def test_it_stays_by_a_pattern_and_by_default() -> None:
    for recipe in (Recipe(), Recipe(head="auto", skip=("lm_head",)), Recipe(head="auto", only=("*.q_proj",))):
        model = made(recipe=recipe)
        assert not isinstance(model.lm_head, W8A8Linear)
        assert model.smoothquant_report.head is None
    with pytest.raises(SmoothQuantError, match="cannot run in 8 bits: skipped by pattern; use --head float"):
        made(recipe=Recipe(head="8bit", skip=("lm_head",)))


def test_a_model_without_one() -> None:
    name = "T5ForConditionalGeneration"
    batch = {key: value for key, value in OTHERS[name][2].items() if isinstance(value, Tensor)}
    with pytest.raises(SmoothQuantError, match="cannot run in 8 bits: it shares its weight with"):
        quantize(build_other(name), [batch] * 3, HEAD, progress=False)
    model = quantize(build_other(name), [batch] * 3, Recipe(head="auto"), progress=False)
    assert not isinstance(model.lm_head, W8A8Linear)


def test_a_damaged_head_is_named() -> None:
    model = tiny.build("llama")
    model.lm_head.weight.data[5, 3] = math.nan
    with pytest.raises(SmoothQuantError, match=r"lm_head\.weight holds 1 non-finite value"):
        quantize(model, DATA, HEAD, progress=False)


def test_the_limit_on_the_perplexity_counts_it_in() -> None:
    limit = 0.001
    recipe = Recipe(head="8bit", max_ppl_increase=limit)
    model = made(recipe=recipe, tie_word_embeddings=True)
    held_out = [DATA[0], DATA[4]]
    original = log_likelihood(tiny.build("llama", tie_word_embeddings=True), held_out)
    assert shares_head(model)
    increase = math.expm1(original - log_likelihood(model, held_out))
    left_out = {name for name in model.smoothquant_report.skipped if name != "lm_head"}
    assert increase <= limit or len(left_out) == 14, "all else is in floating point then"


@pytest.mark.parametrize("factor", [1e-2, 1e-6])
def test_channels_that_the_last_norm_makes_small(factor: float) -> None:
    """Smoothing by what the head reads alone would divide what the embedding gets of them by next to nothing."""
    original = tiny.build("llama", tie_word_embeddings=True)
    original.model.norm.weight.data[:8] *= factor
    expected, before = tiny.logits(original, DATA[0]), original.model.embed_tokens.weight.detach().clone()
    model = quantize(original, DATA, Recipe(head="8bit"), progress=False)
    error = (model.get_input_embeddings().weight - before).square().mean(0).sqrt()
    # A step of INT8 is the largest of 64 Gaussian values, about 2.4 deviations, over 127, and rounding costs
    # 1 / sqrt(12) of a step: 0.55 %. Smoothing may double that, and GPTQ, which moves errors to channels that the head
    # hardly reads, makes it up to four times as large here.
    assert float(error.max()) < 2 * 4 * 0.0055 * float(before.square().mean().sqrt())
    assert tiny.relative_error(model, expected, DATA[0]) < 0.05


def test_the_embedding_is_measured_too() -> None:
    def spoiled(*args: Any, **kwargs: Any) -> W8A8Embedding:
        embedding = W8A8Embedding(*args, **kwargs)
        embedding.factor.data *= -3
        return embedding

    for dtype in (torch.float32, torch.bfloat16):
        good = made(recipe=Recipe(head="auto"), tie_word_embeddings=True, dtype=dtype)
        with patch.object(head_module, "W8A8Embedding", spoiled):
            bad = made(recipe=Recipe(head="auto"), tie_word_embeddings=True, dtype=dtype)
        assert shares_head(good)
        assert not shares_head(bad)
        assert bad.smoothquant_report.head.kl > 10 * good.smoothquant_report.head.kl


def test_an_embedding_that_gives_no_numbers_is_not_taken() -> None:
    def broken(*args: Any, **kwargs: Any) -> W8A8Embedding:
        embedding = W8A8Embedding(*args, **kwargs)
        embedding.factor.data *= math.nan
        return embedding

    with patch.object(head_module, "W8A8Embedding", broken):
        model = made(recipe=Recipe(head="auto"), tie_word_embeddings=True)
    assert not shares_head(model)
    assert model.smoothquant_report.head is None
    assert model.smoothquant_report.skipped == {"lm_head": "output embedding: with it the predictions are not finite"}
    with patch.object(head_module, "W8A8Embedding", broken), pytest.raises(SmoothQuantError, match="are not finite"):
        made(tie_word_embeddings=True)


def test_a_head_that_cannot_be_measured_or_never_ran() -> None:
    def fail(*_args: Any) -> Tensor:
        raise SmoothQuantError("the model fails on a batch")

    with patch.object(head_cost, "logits_of", fail):
        model = made(recipe=Recipe(head="auto"))
        with pytest.raises(SmoothQuantError, match="in 8 bits: with it the model fails on a batch; use --head float"):
            made()
    reason = "output embedding: with it the model fails on a batch"
    assert model.smoothquant_report.skipped == {"lm_head": reason}
    structure = find_structure(tiny.build("llama"), DATA[0])
    idle = HeadQuantizer(structure, HEAD, select_linears(structure, HEAD))
    with pytest.raises(SmoothQuantError, match="it never ran during calibration"):
        idle.quantize([], Placement(torch.device("cpu")), lambda _: iter)


def test_the_report_says_that_its_scales_are_dynamic() -> None:
    report = made(recipe=Recipe("int8-static", head="8bit")).smoothquant_report
    assert report.per_token == ["lm_head"]
    text = "\n".join(str(part) for part in render_report(report).renderables)
    assert "With a scale per token, as the output embedding always has: lm_head" in text


def test_an_unknown_choice() -> None:
    with pytest.raises(SmoothQuantError, match="head is 'int4', expected one of float, 8bit, auto"):
        Recipe(head="int4")  # type: ignore[arg-type]


def test_the_model_is_what_it_was_after_an_error() -> None:
    model = tiny.build("llama", tie_word_embeddings=True)
    before = logits(model)
    with (
        patch("smoothquant_ext.quantization.pipeline.fuse_", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        quantize(model, DATA, HEAD, progress=False)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), before)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_generating_and_tying_again() -> None:
    model = made(tie_word_embeddings=True)
    expected = model.generate(DATA[0], max_new_tokens=4, do_sample=False)
    model.tie_weights()
    assert torch.equal(model.generate(DATA[0], max_new_tokens=4, do_sample=False), expected)
    with pytest.raises(SmoothQuantError, match="the output embedding has 8 bits; resize it before"):
        model.resize_token_embeddings(200)
