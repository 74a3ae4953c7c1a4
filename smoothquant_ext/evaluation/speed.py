"""Speed of a model in tokens per second."""

from __future__ import annotations

import inspect
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmoothQuantError
from ..probing.blocks import Batch, device_of, run_model, token_ids
from ..probing.lookups import Limits, find_limits
from ..progress import track


@dataclass(frozen=True)
class Speed:
    """Seconds per round for ``batch`` prompts of ``prompt`` tokens and for ``generated`` tokens after each."""

    prompt: int
    generated: int
    batch: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]

    @property
    def prefill(self) -> float:
        """Tokens per second of all prompts together, median over rounds."""
        return self.batch * self.prompt / statistics.median(self.prefill_seconds)

    @property
    def decode(self) -> float:
        """Tokens per second of all answers together, median over rounds."""
        return self.batch * self.generated / statistics.median(self.decode_seconds)


def measure_speed(
    models: Mapping[str, nn.Module],
    prefill: int = 512,
    decode: int = 32,
    rounds: int = 5,
    batch: int = 1,
    progress: bool = False,
) -> dict[str, Speed]:
    """Times causal LMs as ``generate`` runs them: a prompt with logits of its last token only, then token by token.

    The models take turns in an order that rotates from round to round, so that a disturbance of the machine affects
    all of them. A first round warms up and does not count. torch's thread count does not change.

    Args:
        models: transformers causal LMs by name, on any device.
        prefill: tokens of a prompt; with a warning fewer, if a model has too few positions for them and the answer.
        decode: tokens generated after it with a key-value cache.
        rounds: number of rounds; ``Speed`` gives their median.
        batch: number of prompts answered together.
        progress: whether to show a progress bar on stderr.

    Raises:
        SmoothQuantError: a number below 1, or an answer that a model has too few positions for.
    """
    for what, number in (("prefill", prefill), ("decode", decode), ("rounds", rounds), ("batch", batch)):
        if number < 1:
            raise SmoothQuantError(f"{what} is {number}, expected at least 1")
    limits = Limits.least(map(find_limits, models.values()))
    prefill = _fitting_prompt(limits, prefill, decode)
    vocabulary = limits.vocabulary or 2
    prompt = torch.randint(vocabulary, (batch, prefill), generator=torch.Generator().manual_seed(0))
    names = list(models)
    prefill_seconds: dict[str, list[float]] = {name: [] for name in names}
    decode_seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(rounds + 1), "Measuring speed", progress):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            first, rest = _time_generation(models[name], prompt, decode)
            if turn > 0:
                prefill_seconds[name].append(first)
                decode_seconds[name].append(rest)
    return {
        name: Speed(prefill, decode, batch, tuple(prefill_seconds[name]), tuple(decode_seconds[name])) for name in names
    }


@dataclass(frozen=True)
class Throughput:
    """Seconds per round for one pass over ``rows`` inputs."""

    rows: int
    seconds: tuple[float, ...]

    @property
    def rows_per_second(self) -> float:
        """Inputs per second, median over rounds."""
        return self.rows / statistics.median(self.seconds)


def measure_throughput(
    models: Mapping[str, nn.Module], batches: Sequence[Batch], rounds: int = 5, progress: bool = False
) -> dict[str, Throughput]:
    """Times models of any class on batches of inputs; they take turns as in ``measure_speed``.

    Args:
        models: by name, on any device.
        batches: token ids [B, T] or the arguments of ``forward``.
        rounds: number of rounds, besides a first one that warms up.
        progress: whether to show a progress bar on stderr.

    Raises:
        SmoothQuantError: a model fails on a batch.
    """
    names, rows = list(models), sum(len(token_ids(batch)) for batch in batches)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in track(range(rounds + 1), "Measuring speed", progress):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            device = device_of(models[name])
            start = _now(device)
            for batch in batches:
                run_model(models[name], batch)
            if turn > 0:
                seconds[name].append(_now(device) - start)
    return {name: Throughput(rows, tuple(seconds[name])) for name in names}


def _fitting_prompt(limits: Limits, prefill: int, decode: int) -> int:
    """The tokens of a prompt that leave room for the answer."""
    positions, trained = limits.positions, limits.trained
    if positions is None or prefill + decode <= positions:
        if trained is not None and prefill + decode > trained:
            warnings.warn(f"{prefill} + {decode} tokens are timed, and the model was made for {trained}", stacklevel=3)
        return prefill
    if decode >= positions:
        raise SmoothQuantError(f"decode is {decode} and the model has {positions} positions: ask for a shorter answer")
    warnings.warn(
        f"the model has {positions} positions, fewer than {prefill} + {decode} tokens: the prompt has "
        f"{positions - decode}",
        stacklevel=3,
    )
    return positions - decode


@torch.no_grad()
def _time_generation(model: nn.Module, prompt: Tensor, decode: int) -> tuple[float, float]:
    """Seconds for the prompts [B, T] and seconds for the generated tokens."""
    device = device_of(model)
    prompt = prompt.to(device)
    parameters = inspect.signature(model.forward).parameters
    last_only = "logits_to_keep" in parameters
    cache = "cache" if "cache" in parameters else "past_key_values"  # the name changed in transformers 5
    options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if last_only else {})

    start = _now(device)
    output = model(input_ids=prompt, **options)
    token = output.logits[:, -1:].argmax(-1)
    middle = _now(device)
    for _ in range(decode):
        output = model(input_ids=token, **{cache: getattr(output, cache)}, **options)
        token = output.logits[:, -1:].argmax(-1)
    return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
