"""Accuracy of a model: perplexity, and agreement with a reference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import memory_explained
from ..errors import SmoothQuantError
from ..probing.batches import Batches
from ..probing.blocks import Batch, device_of, run_model, token_ids
from ..probing.lookups import Limits, find_limits
from ..progress import track

CHUNK = 64
"""Rows of logits that are cast to fp32 at a time: a copy of all rows would double the memory of evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """The results of a model on a text. Every ``*_error`` is the standard error over windows, ``None`` for one window.

    Attributes:
        tokens: number of predicted tokens: all of each window except its first.
        perplexity: exp of the mean negative log likelihood per token.
        change: perplexity divided by the reference's, minus 1; its error is that of the pairwise difference.
        kl: mean KL(reference || model) per token, in nats.
        top1: share of the positions at which model and reference find the same token likeliest.

    ``change``, ``kl`` and ``top1`` are ``None`` without a reference.
    """

    tokens: int
    perplexity: float
    perplexity_error: float | None = None
    change: float | None = None
    change_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    top1_error: float | None = None


def evaluate(model: nn.Module, windows: Any, reference: nn.Module | None = None, progress: bool = False) -> Evaluation:
    """Measures a causal LM on windows of tokens: perplexity and, with a reference, how closely it follows that model.

    Args:
        model: a transformers causal LM.
        windows: token ids [samples, T], as ``token_windows`` gives them, or data in any other form that ``quantize``
            takes. Padding does not count; rows of one token have nothing to predict and are left out.
        reference: the model to compare with, usually the original in floating point.
        progress: whether to show a progress bar on stderr.

    Raises:
        SmoothQuantError: windows of a wrong form or with tokens outside the model's vocabulary, models with different
            vocabularies, logits that are not finite.
    """
    return evaluate_all({"the model": model}, windows, reference, progress)["the model"]


def evaluate_all(
    models: Mapping[str, nn.Module], windows: Any, reference: nn.Module | None = None, progress: bool = False
) -> dict[str, Evaluation]:
    """``evaluate`` for several models on the same windows. The reference runs once per window; it may be one of them.

    Memory holds the logits of one window at a time: the reference's and one model's.
    """
    rows = _rows(models if reference is None else {"the reference": reference, **models}, windows)
    tallies = {name: Tally() for name in models}
    with memory_explained("give shorter windows (--seqlen), or the device cpu"):
        for window in track(rows, "Evaluating", progress):
            _evaluate_window(models, window, reference, tallies)
    return {name: tally.result() for name, tally in tallies.items()}


def _rows(models: Mapping[str, nn.Module], windows: Any) -> list[Tensor]:
    """The windows one by one, int64 [1, T], of all tokens that all of the models can be given."""
    batches = Batches(next(iter(models.values())), windows, Limits.least(map(find_limits, models.values())), "batch")
    rows: list[Tensor] = []
    for number, batch in enumerate(batches, 1):
        if not isinstance(batch, Tensor):
            fields = ", ".join(map(repr, batch))
            raise SmoothQuantError(f"batch {number} has {fields}, expected token ids [B, T] and at most their mask")
        rows.extend(batch.split(1))
    predicted = [row for row in rows if row.shape[1] > 1]
    if not predicted:
        raise SmoothQuantError("the windows have no token to predict: give windows of at least 2 tokens")
    if len(predicted) < len(rows):
        warnings.warn(f"{len(rows) - len(predicted)} windows of one token are left out", stacklevel=2)
    return predicted


def _evaluate_window(
    models: Mapping[str, nn.Module], window: Tensor, reference: nn.Module | None, tallies: dict[str, Tally]
) -> None:
    """Adds one window [1, T] to the tallies. When it returns, the memory of the logits is free for the next window."""
    expected = None if reference is None else _logits(reference, window)
    for name, model in models.items():
        logits = expected if expected is not None and model is reference else _logits(model, window)
        if expected is not None and logits.shape != expected.shape:
            raise SmoothQuantError(
                f"{name} has a vocabulary of {logits.shape[-1]} and the reference one of {expected.shape[-1]}: "
                "compare a quantized model with its original"
            )
        tally = tallies[name]
        tally.add(window, logits, expected)
        for culprit, nll in ((name, tally.nll), ("the reference", tally.reference_nll)):
            if nll and not math.isfinite(nll[-1]):
                raise SmoothQuantError(
                    f"{culprit} gives logits that are not finite on window {len(nll) - 1}: "
                    "it is damaged, or overflows in its dtype"
                )
        del logits  # before the next model computes its logits


@dataclass
class Tally:
    """The mean of each measure over the tokens of a window, one value a window, and how many tokens it predicts."""

    counts: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)

    def add(self, window: Tensor, logits: Tensor, expected: Tensor | None) -> None:
        """Adds one window: token ids [1, T], the model's logits [T - 1, V] and the reference's, if any."""
        targets = window[0, 1:].to(logits.device)
        count = targets.numel()
        nll, reference_nll, kl, top1 = 0.0, 0.0, 0.0, 0
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            label = targets[part, None]
            log_q = torch.log_softmax(logits[part].float(), dim=-1)
            nll -= float(log_q.gather(1, label).sum(dtype=torch.float64))
            if expected is None:
                continue
            log_p = torch.log_softmax(expected[part].to(logits.device).float(), dim=-1)
            reference_nll -= float(log_p.gather(1, label).sum(dtype=torch.float64))
            kl += _sum_kl(log_p, log_q)
            top1 += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        self.counts.append(count)
        self.nll.append(nll / count)
        if expected is not None:
            self.reference_nll.append(reference_nll / count)
            self.kl.append(kl / count)
            self.top1.append(top1 / count)

    def result(self) -> Evaluation:
        """Means over the tokens of all windows."""
        nll, nll_error = _mean_and_error(self.nll, self.counts)
        perplexity = math.exp(nll)
        tokens = sum(self.counts)
        if not self.kl:
            return Evaluation(tokens, perplexity, _times(perplexity, nll_error))
        difference, difference_error = _mean_and_error(
            [nll - reference for nll, reference in zip(self.nll, self.reference_nll, strict=True)], self.counts
        )
        return Evaluation(
            tokens,
            perplexity,
            _times(perplexity, nll_error),
            math.expm1(difference),
            _times(math.exp(difference), difference_error),
            *_mean_and_error(self.kl, self.counts),
            *_mean_and_error(self.top1, self.counts),
        )


@torch.no_grad()
def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """Logits [T - 1, V] that predict tokens 1 .. T - 1 of a window [1, T]."""
    logits: Tensor = model(input_ids=window.to(device_of(model)), use_cache=False).logits
    return logits[0, :-1]


def _mean_and_error(values: list[float], weights: list[int]) -> tuple[float, float | None]:
    """Mean of windows by their tokens, and its standard error: that of a ratio of sums over windows."""
    total = sum(weights)
    mean = math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    if len(values) < 2:
        return mean, None
    squares = math.fsum((weight * (value - mean)) ** 2 for value, weight in zip(values, weights, strict=True))
    return mean, math.sqrt(squares * len(values) / (len(values) - 1)) / total


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error


@torch.no_grad()
def log_likelihood(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Mean log likelihood per predicted token, in nats, of batches of token ids [B, T]."""
    total, count = 0.0, 0
    for batch in batches:
        log_q = log_probabilities(model, batch)[:, :-1]
        ids = token_ids(batch).to(log_q.device)
        if ids.is_floating_point():
            raise SmoothQuantError("a perplexity needs token ids, and the data holds inputs_embeds: give input_ids")
        total += float(log_q.gather(-1, ids[:, 1:, None]).sum(dtype=torch.float64))
        count += ids[:, 1:].numel()
    return total / max(1, count)


def mean_kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over positions of KL(p || q), in nats, from log probabilities [B, T, V]."""
    log_p, log_q = log_p.flatten(0, -2), log_q.flatten(0, -2)
    total = 0.0
    for p, q in zip(log_p.split(CHUNK), log_q.split(CHUNK), strict=True):
        total += _sum_kl(p, q)
    return total / len(log_p)


def _sum_kl(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over positions [M, V] of KL(p || q), nats."""
    # p log(p / q) is 0 where p is: some models mask unused tokens with -inf.
    terms = (log_p.exp() * (log_p - log_q)).masked_fill_(log_p == -math.inf, 0.0)
    return float(terms.sum(dtype=torch.float64))


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """Log probabilities, fp32 [B, T, V], of every token at every position of a batch."""
    return torch.log_softmax(logits_of(model, batch).float(), dim=-1)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The logits [..., V] of a batch, in the model's dtype.

    Raises:
        SmoothQuantError: the model returns none, because it predicts no classes.
    """
    output = run_model(model, batch)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise SmoothQuantError(f"{type(model).__name__} returns no logits, which its predictions would be seen by")
    return logits
