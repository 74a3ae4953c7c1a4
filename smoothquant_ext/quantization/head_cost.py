"""What a head in 8 bits costs the predictions, and the token embedding that reads its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..evaluation.accuracy import CHUNK, logits_of, mean_kl
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch
from ..probing.head import Head
from ..probing.hooks import hooked, swapped
from ..probing.linears import Linear, as_linear, weight_nk

ROWS = 8192  # of the weight, which are widened at once


def added_kl(
    model: nn.Module,
    head: Head,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> float:
    """Mean KL(original || with the 8-bit ``modules``) on the batches, nats per token.

    All heads give fp32 here, because the rounding of logits to 16 bits would cost more than the head. So would that
    of all other layers, once the embeddings have changed. What embeddings cost that are off by one rounding is
    therefore taken off, and the head alone is measured besides. Infinite if something is not finite.
    """
    original = _Wide(as_linear(model.get_submodule(head.name)))
    eight_bit = _Wide(cast(W8A8Linear, modules[head.name]))
    total = dict.fromkeys(("rounding", "head", "both"), 0.0)
    count = 0
    for batch in progress(batches):
        with swapped(model, {head.name: original}):
            expected = logits_of(model, batch).flatten(0, -2)
            if head.embedding:
                with hooked({"": model.get_submodule(head.embedding)}, after=_off_by_one_rounding):
                    total["rounding"] += _sum_kl(expected, logits_of(model, batch))
        with swapped(model, {head.name: eight_bit}):
            total["head"] += _sum_kl(expected, logits_of(model, batch))
        if head.embedding:
            with swapped(model, {**modules, head.name: eight_bit}):
                total["both"] += _sum_kl(expected, logits_of(model, batch))
        count += len(expected)
    costs = total["head"], total["both"] - total["rounding"]
    return max(costs) / count if count and all(map(math.isfinite, costs)) else math.inf


def _sum_kl(expected: Tensor, logits: Tensor) -> float:
    """Sum of KL(p || q) over positions, from logits [M, V] and [..., V]."""
    pairs = zip(expected.split(CHUNK), logits.flatten(0, -2).split(CHUNK), strict=True)
    return sum(mean_kl(p.float().log_softmax(-1), q.float().log_softmax(-1)) * len(p) for p, q in pairs)


def _off_by_one_rounding(_name: str, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
    """Embeddings, each value larger or smaller by one epsilon of its dtype."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(2, output.shape, generator=generator) * 2 - 1).to(output.device)
    return (output.float() * (1 + torch.finfo(output.dtype).eps * signs)).to(output.dtype)


class _Wide(nn.Module):
    """A head whose output is fp32 whatever its input is."""

    def __init__(self, head: Linear | W8A8Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., V]"""
        if isinstance(self.head, W8A8Linear):
            logits: Tensor = self.head(x.float())
            return logits
        x, bias, weight = x.float(), self.head.bias, weight_nk(self.head)
        parts = [functional.linear(x, rows.float()) for rows in weight.split(ROWS)]
        return torch.cat(parts, -1) if bias is None else torch.cat(parts, -1) + bias.float()
