"""Perplexity, KL and agreement against plain formulas in float64; speed against a clock of our own; bytes."""

from __future__ import annotations

import json
import math
import statistics
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from tiny import VOCAB, build, token_ids
from torch import Tensor, nn

from smoothquant_ext import Recipe, SmoothQuantError, evaluate, quantize
from smoothquant_ext.evaluation import speed
from smoothquant_ext.evaluation.accuracy import Evaluation, evaluate_all
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.evaluation.speed import measure_speed
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.scheme import SCHEMES

# evaluate sums in float64 what it computes in float32: log_softmax over 96 logits of magnitude below 2**6 rounds by a
# few units of 2**-24 * 2**6, so a mean differs by less than this.
ROUNDING = 2e-5


class Scripted(nn.Module):
    """A language model that returns given logits, window after window, and remembers being called."""

    def __init__(self, *logits: Tensor, vocabulary: int = VOCAB) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 2)
        self.logits = logits
        self.calls = 0
        self.alive: list[weakref.ref[Tensor]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = self.logits[self.calls % len(self.logits)].clone()
        self.calls += 1
        assert all(old() is None for old in self.alive), "logits of an earlier window are still held"
        self.alive.append(weakref.ref(logits))
        return SimpleNamespace(logits=logits[None])


def random_logits(windows: int, length: int, seed: int = 0, spread: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(windows, length, VOCAB, generator=generator) * spread)


def plain(logits: list[Tensor], expected: list[Tensor], windows: Tensor) -> dict[str, list[float]]:
    """Per window, in float64 and all at once: what evaluate computes in pieces."""
    result: dict[str, list[float]] = {"nll": [], "reference_nll": [], "kl": [], "top1": []}
    for own, reference, window in zip(logits, expected, windows, strict=True):
        log_q, log_p = own[:-1].double().log_softmax(-1), reference[:-1].double().log_softmax(-1)
        result["nll"].append(float(nn.functional.nll_loss(log_q, window[1:])))
        result["reference_nll"].append(float(nn.functional.nll_loss(log_p, window[1:])))
        result["kl"].append(float(nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")))
        result["top1"].append(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))
    return result


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize("length", [2, 64, 65, 200])  # around the size of the chunks
def test_all_measures_equal_the_plain_formulas(length):
    windows = token_ids(5, length)
    logits, expected = random_logits(5, length), random_logits(5, length, seed=1)
    measured = evaluate(Scripted(*logits), windows, reference=Scripted(*expected))
    means = plain(logits, expected, windows)
    difference = [own - reference for own, reference in zip(means["nll"], means["reference_nll"], strict=True)]
    perplexity = math.exp(statistics.fmean(means["nll"]))
    ratio = math.exp(statistics.fmean(difference))
    near = {"rel": ROUNDING * 10, "abs": ROUNDING}
    assert measured.tokens == 5 * (length - 1)
    assert measured.perplexity == pytest.approx(perplexity, **near)
    assert measured.perplexity_error == pytest.approx(perplexity * standard_error(means["nll"]), **near)
    assert measured.change == pytest.approx(ratio - 1, **near)
    assert measured.change_error == pytest.approx(ratio * standard_error(difference), **near)
    assert measured.kl == pytest.approx(statistics.fmean(means["kl"]), **near)
    assert measured.kl_error == pytest.approx(standard_error(means["kl"]), **near)
    assert measured.top1 == pytest.approx(statistics.fmean(means["top1"]))
    assert measured.top1_error == pytest.approx(standard_error(means["top1"]))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    measured = evaluate(Scripted(torch.zeros(40, VOCAB)), token_ids(3, 40))
    assert measured.perplexity == pytest.approx(VOCAB, rel=ROUNDING)
    assert (measured.change, measured.kl, measured.top1) == (None, None, None)


def test_a_real_model_agrees_with_its_own_loss():
    model, windows = build("llama"), token_ids(4, 32)
    with torch.no_grad():
        loss = float(model(windows, labels=windows).loss)
    assert evaluate(model, windows).perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_the_reference_runs_once_per_window_and_is_reused_as_a_model():
    logits = random_logits(3, 20)
    reference, other, third = Scripted(*logits), Scripted(*random_logits(3, 20, 1)), Scripted(*logits)
    results = evaluate_all({"base": reference, "a": other, "b": third}, token_ids(3, 20), reference)
    assert (reference.calls, other.calls, third.calls) == (3, 3, 3)
    assert list(results) == ["base", "a", "b"]
    assert results["base"] == results["b"]
    assert (results["base"].kl, results["base"].top1, results["base"].change) == (0.0, 1.0, 0.0)
    assert results["a"].kl > 0.1


def test_one_window_has_no_standard_error():
    measured = evaluate(Scripted(*random_logits(1, 9)), token_ids(1, 9), reference=Scripted(*random_logits(1, 9, 1)))
    assert measured.perplexity_error is measured.change_error is measured.kl_error is measured.top1_error is None


def test_tokens_masked_with_minus_infinity_do_not_spoil_kl():
    logits, expected = random_logits(1, 9), random_logits(1, 9, 1)
    for tensor in (*logits, *expected):
        tensor[:, :3] = -math.inf
    windows = token_ids(1, 9)
    measured = evaluate(Scripted(*logits), windows, reference=Scripted(*expected))
    kept = plain([t[:, 3:] for t in logits], [t[:, 3:] for t in expected], windows - 3)
    assert measured.kl == pytest.approx(kept["kl"][0], rel=1e-4)


def test_half_precision_logits_are_raised():
    logits = random_logits(2, 30, spread=8.0)
    windows = token_ids(2, 30)
    measured = evaluate(Scripted(*[t.bfloat16() for t in logits]), windows)
    means = plain([t.bfloat16() for t in logits], logits, windows)
    assert measured.perplexity == pytest.approx(math.exp(statistics.fmean(means["nll"])), rel=1e-3)


def test_logits_that_are_not_finite_are_an_error():
    broken = random_logits(2, 9)
    broken[1][4] = math.nan
    with pytest.raises(SmoothQuantError, match="quantized gives logits that are not finite on window 1"):
        evaluate_all({"quantized": Scripted(*broken)}, token_ids(2, 9))
    with pytest.raises(SmoothQuantError, match="the reference gives logits that are not finite on window 1"):
        evaluate(Scripted(*random_logits(2, 9)), token_ids(2, 9), reference=Scripted(*broken))


@pytest.mark.parametrize(
    ("windows", "complaint"),
    [
        (torch.tensor(5), r"torch\.int64 \[\], expected token ids"),
        (torch.zeros(0, 9, dtype=torch.int64), "no token to predict"),
        (torch.zeros(2, 1, dtype=torch.int64), "no token to predict: give windows of at least 2 tokens"),
        ([{"text": "a text"}], "batch 1 has no field 'input_ids'"),
        ("a text", "the batches are a text: make token ids of a text with token_windows"),
        (torch.zeros(2, 9), r"torch\.float32 \[2, 9\], expected"),
        (torch.full((2, 9), VOCAB), f"token {VOCAB} and the model has a vocabulary of {VOCAB}"),
        (torch.full((2, 9), -1), "token -1 and the model"),
    ],
)
def test_bad_windows_are_named(windows, complaint):
    with pytest.raises(SmoothQuantError, match=complaint):
        evaluate(Scripted(*random_logits(1, 9)), windows)


def test_embeddings_have_no_tokens_to_predict():
    with pytest.raises(SmoothQuantError, match=r"batch 1 has 'inputs_embeds', expected token ids \[B, T\]"):
        evaluate(build("llama"), [{"inputs_embeds": torch.zeros(1, 9, 64)}])


def test_models_with_other_vocabularies_are_not_compared():
    small = Scripted(torch.zeros(9, VOCAB - 1))
    with pytest.raises(SmoothQuantError, match=f"the model has a vocabulary of {VOCAB - 1} and the reference one of"):
        evaluate(small, token_ids(1, 9), reference=Scripted(*random_logits(1, 9)))


def test_progress_goes_to_stderr(capfd):
    evaluate(Scripted(*random_logits(2, 9)), token_ids(2, 9), progress=True)
    captured = capfd.readouterr()
    assert "Evaluating" in captured.err
    assert captured.out == ""


def test_evaluations_are_plain_data():
    assert json.loads(json.dumps(Evaluation(3, 2.5).__dict__))["perplexity"] == 2.5


class Clockwork(nn.Module):
    """A language model that takes a known time per token, on a clock that only it moves."""

    clock = 0.0
    order: ClassVar[list[str]] = []

    def __init__(self, name: str, prompt_seconds: float, token_seconds: float, positions: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 2)
        self.name, self.prompt_seconds, self.token_seconds = name, prompt_seconds, token_seconds
        self.config = SimpleNamespace(max_position_embeddings=positions)
        self.seen: list[tuple[int, int]] = []

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self, input_ids: Tensor, use_cache: bool, logits_to_keep: int = 0, past_key_values: int = 0
    ) -> SimpleNamespace:
        assert use_cache
        tokens = input_ids.shape[1]
        Clockwork.clock += self.prompt_seconds if tokens > 1 else self.token_seconds
        if tokens > 1:
            Clockwork.order.append(self.name)
        self.seen.append((tokens, past_key_values))
        return SimpleNamespace(
            logits=torch.zeros(len(input_ids), logits_to_keep or tokens, 11), past_key_values=past_key_values + tokens
        )


@pytest.fixture
def clock(monkeypatch):
    Clockwork.clock, Clockwork.order = 0.0, []
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: Clockwork.clock))


@pytest.mark.usefixtures("clock")
def test_speed_is_tokens_per_second_of_prompt_and_of_answer():
    models = {"slow": Clockwork("slow", 4.0, 0.5), "fast": Clockwork("fast", 2.0, 0.25)}
    threads = torch.get_num_threads()
    speeds = measure_speed(models, prefill=512, decode=8, rounds=3)
    assert torch.get_num_threads() == threads
    assert (speeds["slow"].prefill, speeds["slow"].decode) == (128.0, 2.0)
    assert (speeds["fast"].prefill, speeds["fast"].decode) == (256.0, 4.0)
    assert len(speeds["slow"].prefill_seconds) == 3
    # a warm-up and three rounds, each a prompt of 512 tokens and 8 single ones on a growing cache
    assert models["slow"].seen == 4 * [(512, 0), *((1, 512 + i) for i in range(8))]
    assert Clockwork.order == ["slow", "fast", "fast", "slow"] * 2
    eight = measure_speed(models, prefill=512, decode=8, rounds=1, batch=8)["slow"]
    assert (eight.prefill, eight.decode) == (8 * 128.0, 8 * 2.0)  # the same seconds for eight times the tokens


@pytest.mark.usefixtures("clock")
def test_speed_refuses_what_cannot_be_run():
    with pytest.raises(SmoothQuantError, match="rounds is 0, expected at least 1"):
        measure_speed({"a": Clockwork("a", 1, 1)}, rounds=0)
    with pytest.raises(SmoothQuantError, match="batch is 0, expected at least 1"):
        measure_speed({"a": Clockwork("a", 1, 1)}, batch=0)
    with pytest.raises(SmoothQuantError, match="decode is 128 and the model has 128 positions"):
        measure_speed({"a": build("gpt2")}, prefill=8, decode=128)


@pytest.mark.usefixtures("clock")
def test_a_prompt_is_as_long_as_every_model_has_positions_for():
    """Which rotary models have without end."""
    models = {"tables": build("opt"), "rotary": build("llama", max_position_embeddings=16)}
    with pytest.warns(UserWarning, match=r"has 128 positions, fewer than 512 \+ 4 tokens: the prompt has 124"):
        speeds = measure_speed(models, prefill=512, decode=4, rounds=1)
    assert {speed.prompt for speed in speeds.values()} == {124}
    assert measure_speed({"rotary": models["rotary"]}, prefill=40, decode=4, rounds=1)["rotary"].prompt == 40


PADDED = torch.tensor([[0, 0, 7, 8, 9, 4], [5, 3, 9, 8, 0, 0], [0, 0, 0, 0, 0, 6]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_padding_and_rows_of_one_token_do_not_count(architecture):
    model, other = build(architecture), build(architecture, seed=1)
    rows = [PADDED[0, 2:], PADDED[1, :4]]
    expected = evaluate(model, rows, other)
    with pytest.warns(UserWarning, match="1 windows of one token are left out"):
        measured = evaluate(model, [{"input_ids": PADDED, "attention_mask": MASK}], other)
    assert measured == expected
    assert measured.tokens == 6


def test_windows_of_different_lengths_count_by_their_tokens():
    model, rows = build("llama"), [token_ids(1, 3), token_ids(1, 30, seed=2)]
    with torch.no_grad():
        losses = [float(model(ids, labels=ids).loss) for ids in rows]
    measured = evaluate(model, rows)
    assert measured.tokens == 31
    assert measured.perplexity == pytest.approx(math.exp((2 * losses[0] + 29 * losses[1]) / 31), rel=1e-4)


def test_windows_are_cut_to_the_positions_of_the_model():
    model, windows = build("gpt2", max_position_embeddings=16), token_ids(3, 24)
    with pytest.warns(UserWarning, match="has 24 tokens a row and the model 16 positions: rows are cut to 16"):
        assert evaluate(model, windows) == evaluate(model, windows[:, :16])


def test_speed_of_a_real_model():
    speed = measure_speed({"tiny": build("llama")}, prefill=16, decode=4, rounds=2, batch=3)["tiny"]
    assert speed.prefill > 0
    assert speed.decode > 0
    assert (speed.prompt, speed.generated, speed.batch) == (16, 4, 3)


def test_bytes_of_a_float_model_count_everything_once():
    model = build("llama", tie_word_embeddings=True)
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    size = model_bytes(model)
    assert size.decoder == layers
    assert size.total == layers + model.model.embed_tokens.weight.nbytes + model.model.norm.weight.nbytes


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8-static"])
def test_bytes_of_a_quantized_model_are_those_it_is_stored_in(scheme):
    model = quantize(build("llama"), token_ids(), Recipe(scheme), progress=False)
    state = model.state_dict()  # shows the weights as they are stored
    shared = {id(p) for p in model.parameters()}
    assert len(shared) == len(list(model.named_parameters(remove_duplicate=False)))
    assert model_bytes(model).total == sum(tensor.nbytes for tensor in state.values())
    assert model_bytes(model).decoder == sum(t.nbytes for name, t in state.items() if ".layers." in name)


def test_bytes_do_not_depend_on_packing():
    plain = nn.ModuleList([W8A8Linear(70, 90, True, SCHEMES["fp8-static"], device="meta", dtype=torch.bfloat16)])
    expected = 70 * 90 + 4 + 4 + 2 * 90
    assert model_bytes(plain).total == expected
    layer = W8A8Linear(70, 90, False, SCHEMES["fp8-static"])
    layer.weight, layer.weight_scale = torch.zeros(90, 70, dtype=torch.float8_e4m3fn), torch.ones(1)
    layer.prepack_()
    assert model_bytes(layer).total == 70 * 90 + 4 + 4
