"""Tiny models of our own making, whose blocks are wired in ways that trip up whoever runs them one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tiny
import torch
from torch import Tensor, nn

WIDTH, HIDDEN = 40, 72  # neither is a multiple of what kernels like


class Block(nn.Module):
    """norm -> up -> ReLU -> down, and a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class PairBlock(Block):
    """Hands a second tensor along."""

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, other = x if isinstance(x, tuple) else (x, x.flip(-1))
        y = super().forward(x + 0.1 * other)
        return y, other * 0.5


class InPlaceBlock(nn.Module):
    """Changes the very tensor that its layers have read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.first(x)
        x += self.second(x)
        return x


class ExpertBlock(nn.Module):
    """Two experts; only tokens whose first channel is positive go to the second, and ``calls_empty`` ones get none."""

    def __init__(self, calls_empty: bool = True) -> None:
        super().__init__()
        self.calls_empty = calls_empty
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        chosen = x[..., 0] > 0
        out = x.clone()
        for mask, expert in zip((~chosen, chosen), self.experts, strict=True):
            if self.calls_empty or bool(mask.any()):
                out[mask] += expert(y[mask])
        return out


class Stack(nn.Module):
    """Blocks in a list, run in any order, any number of times, with anything between them."""

    def __init__(
        self,
        order: Sequence[int] | Callable[[Tensor], Sequence[int]] = (0, 1, 2),
        between: Callable[[Tensor], Tensor] = lambda x: x,
        make: Callable[[], nn.Module] = Block,
        blocks: int = 3,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, WIDTH)
        self.layers = nn.ModuleList(make() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, tiny.VOCAB)
        self.order, self.between = order, between
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for index in self.order(input_ids) if callable(self.order) else self.order:
            x = self.between(self.layers[index](x))
        return self.head(x[0] if isinstance(x, tuple) else x)


def batches(count: int = 3, rows: int = 1, tokens: int = 9) -> list[Tensor]:
    """Batches of token ids that differ."""
    return [tiny.token_ids(rows, tokens, seed=seed) for seed in range(count)]
