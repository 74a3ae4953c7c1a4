"""How closely models of any class follow a reference: by their predictions, or by the embeddings that they compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import memory_explained
from ..errors import SmoothQuantError
from ..probing.blocks import Batch, run_model, token_ids
from ..probing.values import tensors_in
from ..progress import track
from .accuracy import mean_kl


@dataclass(frozen=True)
class Agreement:
    """How closely a model follows a reference on the same inputs.

    Attributes:
        rows: how many inputs were compared.
        error: root mean square of the difference of the outputs, relative to that of the reference's.
        cosine: mean over inputs of the cosine similarity of the two embeddings; ``None`` for a model that predicts.
        worst_cosine: the lowest of them.
        kl: mean KL(reference || model) of the predictions, nats; ``None`` for a model that predicts no classes.
        top1: share of the predictions for which both find the same class likeliest.
    """

    rows: int
    error: float
    cosine: float | None = None
    worst_cosine: float | None = None
    kl: float | None = None
    top1: float | None = None


def agree_all(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], reference: nn.Module, progress: bool = False
) -> dict[str, Agreement]:
    """Compares models with a reference on batches, as ``Batches`` gives them.

    A model that returns logits is compared by its predictions. Of others the embedding of an input is compared: what
    the model returns as one, or the mean of the last hidden states of its tokens or patches; of yet others, the error
    of the first tensor that they return.

    Args:
        models: by name; the reference may be one of them.
        batches: token ids [B, T] or the arguments of ``forward``.
        reference: usually the original in floating point.
        progress: whether to show a progress bar on stderr.

    Raises:
        SmoothQuantError: there is no batch, or outputs are not finite or of another shape than the reference's.
    """
    tallies = {name: _Tally() for name in models}
    with memory_explained("give shorter or fewer rows in a batch, or the device cpu"):
        for batch in track(batches, "Comparing", progress):
            expected = outputs_of(reference, batch)
            for name, model in models.items():
                given = expected if model is reference else outputs_of(model, batch)
                tallies[name].add(name, given, expected, len(token_ids(batch)))
    if not all(tally.rows for tally in tallies.values()):
        raise SmoothQuantError("there is nothing to compare the models on: give at least one batch")
    return {name: tally.result() for name, tally in tallies.items()}


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch: predictions [P, classes], embeddings [E, D], or other numbers."""

    predictions: tuple[Tensor, ...] = ()
    embeddings: tuple[Tensor, ...] = ()
    others: tuple[Tensor, ...] = ()

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Of all tensors, by kind."""
        return [[tuple(each.shape) for each in kind] for kind in (self.predictions, self.embeddings, self.others)]


def outputs_of(model: nn.Module, batch: Batch) -> Outputs:
    """Runs a model and picks from its output what people use of it, in fp32 and on the CPU.

    Raises:
        SmoothQuantError: it returns no tensor in floating point, or one that is not finite.
    """
    output = run_model(model, batch)
    named = dict(output) if isinstance(output, Mapping) else {}
    tensors = {name: value.detach().float().cpu() for name, value in named.items() if isinstance(value, Tensor)}
    logits = [tensors["logits"]] if "logits" in tensors else _ending(tensors, "_logits")
    embeddings = _ending(tensors, "_embeds") or [tensors[name] for name in ("last_hidden_state",) if name in tensors]
    if logits:
        found = Outputs(predictions=tuple(map(_as_predictions, logits)))
    elif embeddings:
        found = Outputs(embeddings=tuple(map(_as_embedding, embeddings)))
    else:
        found = Outputs(others=(_first_float(model, output).detach().float().cpu(),))
    for values in (*found.predictions, *found.embeddings, *found.others):
        if not bool(values[values != -math.inf].isfinite().all()):
            raise SmoothQuantError(f"{type(model).__name__} gives values that are not finite: it is damaged")
    return found


def _ending(tensors: Mapping[str, Tensor], end: str) -> list[Tensor]:
    return [value for name, value in tensors.items() if name.endswith(end)]


def _first_float(model: nn.Module, output: Any) -> Tensor:
    for tensor in tensors_in(output):
        if tensor.is_floating_point() and tensor.numel():
            return tensor
    raise SmoothQuantError(f"{type(model).__name__} returns no numbers that could be compared")


def _as_predictions(logits: Tensor) -> Tensor:
    """[P, classes] of logits [..., classes], or of maps [B, classes, H, W]."""
    if logits.dim() == 4:
        logits = logits.movedim(1, -1)
    return logits.reshape(-1, logits.shape[-1]) if logits.dim() > 1 else logits[:, None]


def _as_embedding(values: Tensor) -> Tensor:
    """[B, D] of hidden states [B, T, D] or of feature maps [B, C, H, W]."""
    if values.dim() == 4:
        return values.mean((2, 3))
    return values.mean(1) if values.dim() == 3 else values.reshape(len(values), -1)


class _Tally:
    def __init__(self) -> None:
        self.rows = self.predictions = self.same = 0
        self.squares = self.expected_squares = self.kl = 0.0
        self.cosines: list[float] = []

    def add(self, name: str, given: Outputs, expected: Outputs, rows: int) -> None:
        if given.shapes != expected.shapes:
            raise SmoothQuantError(f"{name} returns something else than the reference: compare it with its original")
        self.rows += rows
        for one, other in zip(given.predictions, expected.predictions, strict=True):
            self._add_squares(one, other)
            if one.shape[-1] > 1:  # else it is a number, not a class
                self.kl += mean_kl(torch.log_softmax(other, -1), torch.log_softmax(one, -1)) * len(one)
                self.same += int((one.argmax(-1) == other.argmax(-1)).sum())
                self.predictions += len(one)
        for one, other in zip(given.embeddings, expected.embeddings, strict=True):
            self._add_squares(one, other)
            cosines = torch.cosine_similarity(one.double(), other.double(), dim=-1)
            self.cosines += cosines.masked_fill((one == other).all(-1), 1.0).tolist()  # of vectors of zeros, too
        for one, other in zip(given.others, expected.others, strict=True):
            self._add_squares(one, other)

    def _add_squares(self, given: Tensor, expected: Tensor) -> None:
        seen = expected != -math.inf  # some models mask classes with it
        self.squares += float((given - expected)[seen].square().sum(dtype=torch.float64))
        self.expected_squares += float(expected[seen].square().sum(dtype=torch.float64))

    def result(self) -> Agreement:
        error = math.sqrt(self.squares / self.expected_squares) if self.expected_squares else 0.0
        if self.cosines:
            return Agreement(self.rows, error, math.fsum(self.cosines) / len(self.cosines), min(self.cosines))
        if self.predictions:
            return Agreement(
                self.rows, error, kl=max(0.0, self.kl / self.predictions), top1=self.same / self.predictions
            )
        return Agreement(self.rows, error)
