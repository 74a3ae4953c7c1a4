"""Blocks that do what modules do in the wild, and that trip up whoever runs them in another way than their model."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tiny_blocks import HIDDEN, WIDTH, Block
from torch import Tensor, nn


class Own(Exception):
    """An exception that only its module knows."""


EXCEPTIONS: dict[str, Exception] = {
    type(error).__name__: error
    for error in (
        *(KeyError("name"), AttributeError("no x"), AssertionError(), RuntimeError("shape"), IndexError("range")),
        *(TypeError("argument"), ValueError("value"), NotImplementedError("backward"), StopIteration(), Own("mine")),
        *(ZeroDivisionError("division"), RecursionError("deep"), OSError("file"), LookupError("look")),
    )
}


def raising_off_fp32(error: Exception) -> Callable[[], nn.Module]:
    """A block that raises on what is not in fp32, or on a channel of noise: hidden states are smaller here."""

    class Picky(Block):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise error
            return super().forward(x)

    return Picky


def raising_on_noise(error: Exception) -> Callable[[], nn.Module]:
    """A block that raises where its norm's output is not normed."""

    class Checking(Block):
        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            if not torch.allclose(normed.mean(-1), torch.zeros(()).to(x), atol=1e-3):
                raise error
            return x + self.down(torch.relu(self.up(normed)))

    return Checking


class ThreeDimensions(Block):
    """Insists on [B, T, C], in a mixer and in a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        mixed = self.mix(self.norm(x).transpose(1, 2))[..., :tokens].transpose(1, 2)
        return x + self.down(torch.relu(self.up(mixed.reshape(batch, tokens, channels))))


class Counting(Block):
    """Counts its calls in an attribute, a buffer and a list, keeps its activations, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.log, self.stats = 0, list[int](), SimpleNamespace(calls=0, by_size={})
        self.activations: Tensor | None = None
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("largest", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.stats.calls += 1
        self.stats.by_size[x.shape[1]] = self.calls
        self.seen += 1
        torch.maximum(self.largest, x.detach().abs().amax((0, 1)), out=self.largest)
        noise = torch.rand(1) + random.random() + np.random.rand()
        self.activations = torch.relu(self.up(self.norm(x)))
        return x + self.down(self.activations) + 0.0 * noise.to(x)


class Rescaling(Block):
    """Changes its own weights in its first call, once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.is_rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_rescaled:
            with torch.no_grad():
                self.norm.weight.mul_(2.0)
                self.norm.bias.data.mul_(2.0)
            self.is_rescaled = True
        return super().forward(x)


class Noisy(Block):
    """Adds noise in every call, even in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.randn_like(x)


class TwiceFunctional(Block):
    """Reads a layer's weight itself, besides calling it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y) + 0.5 * nn.functional.linear(y, self.up.weight)))


class AsksShape(Block):
    """Asks for the shape of a layer's weight, which is another when it is packed."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.up.weight.shape[0] == HIDDEN
        return super().forward(x)


class Functional(Block):
    """Never calls a layer that it uses."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(nn.functional.linear(self.norm(x), self.up.weight, self.up.bias)))


class AsksDtype(Block):
    """Casts to the dtype of a layer's weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x).to(self.up.weight.dtype))))


class AsksDevice(Block):
    """Asks for the device of a layer's weight, and for its sizes, which are the same in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.up.out_features == HIDDEN
        return x + self.down(torch.relu(self.up(self.norm(x).to(self.up.weight.device))))


class Partial(Block):
    """Calls a layer through a callable that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.call_up = functools.partial(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.call_up(self.norm(x))))


class Listed(Block):
    """Keeps a layer in a plain list too, and calls that one."""

    def __init__(self) -> None:
        super().__init__()
        self.all = [self.up]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.all[0](self.norm(x))))


class TwoNames(Block):
    """Has one layer under two names, and calls both."""

    def __init__(self) -> None:
        super().__init__()
        self.up_again = self.up

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y) - 0.5 * self.up_again(0.5 * y)))


class Tied(Block):
    """Two layers share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, HIDDEN)
        self.other.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y)) + torch.relu(self.other(y)))


class Parametrized(Block):
    """A layer's weight is computed from other parameters."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.up)


class OldWeightNorm(Block):
    """The same, in the way of old: a hook sets the weight before each call."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.up)


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class CustomLinear(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = Doubled(WIDTH, HIDDEN)


class Scaled(nn.Linear):
    """A linear layer that takes a second argument."""

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * super().forward(x)


class ExtraArgument(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = Scaled(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x), factor=0.5)))


class Patched(Block):
    """A layer's forward pass was replaced in the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.up.forward = lambda x: 2.0 * nn.functional.linear(x, self.up.weight, self.up.bias)  # type: ignore[method-assign]


class Hooked(Block):
    """A hook changes what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(_half)


def _half(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return 0.5 * output


class ByName(Block):
    """Calls its layers with their argument's name."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=torch.relu(self.up(input=self.norm(input=x))))


class Unused(Block):
    """Has a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x * x


class OwnFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(Square.apply(self.up(self.norm(x))))


class Items(Block):
    """Takes a value to the host, and decides by it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.abs().max().item() < 1e9 else x


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Inference(Block):
    """Computes in inference mode, whose tensors count no changes."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


class Locked(Block):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.iterator = iter(range(10))
        self.generator = (number for number in range(10))


class TupleBlock(Block):
    def forward(self, x: Any) -> Any:
        return super().forward(x[0] if isinstance(x, tuple) else x), None, [torch.zeros(1)]


@dataclass
class Output:
    hidden: Tensor
    step: int = 0


class DataclassBlock(Block):
    def forward(self, x: Any) -> Any:
        step = x.step + 1 if isinstance(x, Output) else 1
        return Output(super().forward(x.hidden if isinstance(x, Output) else x), step)


class DictBlock(Block):
    def forward(self, x: Any) -> Any:
        return {"hidden": super().forward(x["hidden"] if isinstance(x, dict) else x), "mask": None}


class InPlaceNone(Block):
    """Writes its result into its argument and returns nothing."""

    def forward(self, x: Tensor) -> None:
        x += self.down(torch.relu(self.up(self.norm(x))))
