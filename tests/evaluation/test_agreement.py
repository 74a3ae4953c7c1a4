"""Agreement of models of any class with a reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.evaluation.agreement import agree_all, outputs_of
from smoothquant_ext.evaluation.speed import Throughput, measure_throughput


class Named(dict[str, Any]):
    """As transformers' outputs: a mapping with attributes."""

    __getattr__ = dict.__getitem__


class Says(nn.Module):
    """Returns the same whatever it is given."""

    def __init__(self, **output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, input_ids: Tensor) -> Any:
        return Named(self.output)


ROW = torch.zeros(2, 3, dtype=torch.int64)


def agreement(given: nn.Module, expected: nn.Module) -> Any:
    return agree_all({"it": given, "reference": expected}, [ROW, ROW], expected)


def test_predictions() -> None:
    torch.manual_seed(0)
    expected, noise = torch.randn(2, 5), 0.5 * torch.randn(2, 5)
    results = agreement(Says(logits=expected + noise), Says(logits=expected))
    it = results["it"]
    p, q = expected.double().softmax(-1), (expected + noise).double().softmax(-1)
    assert it.rows == 4
    assert math.isclose(it.error, float(noise.norm() / expected.norm()), rel_tol=1e-5)
    assert math.isclose(it.kl, float((p * (p / q).log()).sum(-1).mean()), rel_tol=1e-4)
    assert it.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert it.cosine is None
    same = results["reference"]
    assert (same.error, same.kl, same.top1) == (0, 0, 1)


def test_embeddings() -> None:
    torch.manual_seed(0)
    hidden, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    it = agreement(Says(last_hidden_state=hidden + noise), Says(last_hidden_state=hidden))["it"]
    cosines = torch.cosine_similarity((hidden + noise).mean(1), hidden.mean(1))
    assert math.isclose(it.cosine, float(cosines.mean()), rel_tol=1e-5)
    assert math.isclose(it.worst_cosine, float(cosines.min()), rel_tol=1e-5)
    assert it.kl is None
    zeros = Says(last_hidden_state=torch.zeros(2, 3, 8))
    assert agreement(zeros, zeros)["it"].cosine == 1


def test_what_is_compared() -> None:
    """Logits before embeddings, all embeddings before hidden states, and of a map of features the mean."""
    one, two, hidden = torch.randn(2, 4), torch.randn(2, 6), torch.randn(2, 3, 8)
    both = outputs_of(Says(last_hidden_state=hidden, text_embeds=one, image_embeds=two), ROW)
    assert [tuple(each.shape) for each in both.embeddings] == [(2, 4), (2, 6)]
    assert outputs_of(Says(logits=one, last_hidden_state=hidden), ROW).shapes == [[(2, 4)], [], []]
    assert outputs_of(Says(start_logits=one, end_logits=two), ROW).shapes == [[(2, 4), (2, 6)], [], []]
    assert outputs_of(Says(logits=torch.randn(2, 5, 4, 3)), ROW).shapes == [[(2 * 4 * 3, 5)], [], []]
    assert outputs_of(Says(logits=torch.randn(2)), ROW).shapes == [[(2, 1)], [], []]
    assert outputs_of(Says(last_hidden_state=torch.randn(2, 5, 4, 4)), ROW).shapes == [[], [(2, 5)], []]
    assert outputs_of(nn.Sequential(nn.Embedding(1, 8)), {"input": ROW}).shapes == [[], [], [(2, 3, 8)]]


def test_numbers_that_are_neither() -> None:
    depth = torch.rand(2, 4, 4)
    it = agreement(Says(predicted_depth=1.5 * depth), Says(predicted_depth=depth))["it"]
    assert math.isclose(it.error, 0.5, rel_tol=1e-5)
    assert (it.cosine, it.kl) == (None, None)


def test_a_number_has_no_classes() -> None:
    it = agreement(Says(logits=torch.tensor([[1.0], [2.0]])), Says(logits=torch.tensor([[1.0], [1.0]])))["it"]
    assert (it.kl, it.top1, it.cosine) == (None, None, None)
    assert math.isclose(it.error, math.sqrt(0.5))


def test_classes_that_are_masked() -> None:
    expected = torch.tensor([[1.0, -math.inf, 0.0]])
    it = agreement(Says(logits=expected + 0.1), Says(logits=expected))["it"]
    assert math.isclose(it.error, math.sqrt(0.02), rel_tol=1e-5)
    assert it.kl < 1e-6


def test_what_cannot_be_compared() -> None:
    logits = Says(logits=torch.randn(2, 5))
    for other in (Says(logits=torch.randn(2, 6)), Says(last_hidden_state=torch.randn(2, 3, 8))):
        with pytest.raises(SmoothQuantError, match="it returns something else than the reference"):
            agreement(other, logits)
    with pytest.raises(SmoothQuantError, match="not finite"):
        agreement(Says(logits=torch.full((2, 5), math.nan)), logits)
    with pytest.raises(SmoothQuantError, match="returns no numbers"):
        agreement(Says(ids=torch.zeros(2, dtype=torch.int64)), logits)
    with pytest.raises(SmoothQuantError, match="nothing to compare"):
        agree_all({"it": logits}, [], logits)


def test_throughput() -> None:
    models = {name: Says(logits=torch.randn(2, 5)) for name in "ab"}
    times = measure_throughput(models, [ROW, ROW], rounds=3)
    assert all(len(each.seconds) == 3 and each.rows == 4 for each in times.values())
    assert Throughput(4, (1.0, 4.0, 2.0)).rows_per_second == 2
