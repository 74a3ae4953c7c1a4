"""Logits through a pipe: a served model is compared like any other, and says when its worker ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from served_model import ServedModel
from torch import Tensor, nn

from smoothquant_ext import SmoothQuantError
from smoothquant_ext.evaluation.accuracy import evaluate_all

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VOCABULARY = 11

# Its logits at a token: a product of the token and each entry of the vocabulary, all of them small whole numbers.
WORKER = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
import logits_server

def logits(window):
    print("libraries print")
    if 10 in window:
        sys.exit(3)
    return (window[:, None] * np.arange({vocabulary}) % 7).astype({dtype!r})

logits_server.serve({vocabulary}, logits)
"""


class Same(nn.Module):
    """The worker's model in this process."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        class Output:
            logits = (input_ids[..., None] * torch.arange(VOCABULARY) % 7).float()

        return Output()


@contextmanager
def served(tmp_path: Path, dtype: str = "float32", script: str = WORKER) -> Iterator[ServedModel]:
    file = tmp_path / "worker.py"
    file.write_text(script.format(folder=str(BENCHMARKS), vocabulary=VOCABULARY, dtype=dtype), encoding="utf-8")
    model = ServedModel([sys.executable, file], "the worker")
    try:
        yield model
    finally:
        model.close()


def test_logits_come_unchanged_whatever_the_worker_prints(tmp_path: Path) -> None:
    with served(tmp_path) as model:
        for window in (torch.tensor([[3]]), torch.arange(10)[None], torch.zeros(1, 300, dtype=torch.int64)):
            assert torch.equal(model(input_ids=window).logits, Same()(window).logits)  # type: ignore[attr-defined]


def test_it_is_evaluated_as_the_model_it_serves(tmp_path: Path) -> None:
    windows = torch.randint(10, (3, 17), generator=torch.Generator().manual_seed(0))
    with served(tmp_path) as model:
        found = evaluate_all({"served": model, "here": Same()}, windows, Same())
    assert found["served"] == found["here"]
    assert found["served"].kl == 0
    assert found["served"].top1 == 1


def test_tokens_that_it_does_not_know_are_refused(tmp_path: Path) -> None:
    with served(tmp_path) as model, pytest.raises(SmoothQuantError, match="11"):
        evaluate_all({"served": model}, torch.tensor([[1, VOCABULARY]]))


@pytest.mark.parametrize(("dtype", "window"), [("float32", [[1, 10]]), ("float64", [[1, 2]])])
def test_a_worker_that_ends_is_named(tmp_path: Path, dtype: str, window: list[list[int]]) -> None:
    with served(tmp_path, dtype) as model, pytest.raises(SmoothQuantError, match=r"the worker: worker\.py ended with"):
        model(input_ids=torch.tensor(window))


def test_a_worker_that_never_starts_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match="ended with status 4"), served(tmp_path, script="raise SystemExit(4)"):
        pass
