"""Quantizes a causal LM's output embedding, its head, and with it the token embedding that has the same weight.

A head is a product as any other, but what it reads has the outliers of the last norm, and each of its errors goes right
into the predictions. So its input is smoothed and, with INT8, rotated, both at run time: nothing before it can take
that over where the token embedding shares its weight. It is one layer only, so it is always rounded by GPTQ. Whether it
pays is measured by the predictions themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.formats.registry import choose_format
from ..errors import SmoothQuantError
from ..hadamard import block_size, rotate_blocks
from ..nn.embedding import W8A8Embedding
from ..nn.linear import W8A8Linear
from ..probing.blocks import Batch, probe_batch, run_model
from ..probing.head import Head, NoHead, find_head
from ..probing.hooks import hooked
from ..probing.linears import Linear, as_linear, weight_nk
from ..probing.structure import Structure
from ..probing.trying import Failed, attempt, untouched
from ..probing.values import first_argument, with_first_argument
from ..scheme import Scheme
from .calibration import CalibrationData
from .convert import quantize_linear
from .head_cost import added_kl
from .placement import Placement
from .recipe import AUTO, FLOAT, Recipe
from .report import HeadReport, LayerReport
from .rotation_choice import ROTATED_DTYPES
from .rounding import round_weight
from .selection import OUTPUT_EMBEDDING, Selection, check_finite_weights
from .smoothing import column_absmax, smoothing_scale

MOST_ADDED_KL = 5e-4
"""Nats a token that a head in 8 bits may cost for ``"auto"`` to take it. It is an eighth of what llama.cpp's Q8_0,
whose head has 8 bits too, costs SmolLM2-135M as a whole."""
MOST_AMPLIFIED = 2.0
"""How much smoothing may raise the error of a channel of the token embedding that reads the weight."""
MOST_TOKENS = 512  # of each of two rows, that the cost is measured on
ELEMENTS = 1 << 26  # of the weight, rounded at once


class HeadQuantizer:
    """Quantizes the head if the recipe asks for it; else, or if there is none to quantize, it does nothing.

    Attributes:
        modules: what takes the places of the head and of the token embedding, by name, after ``quantize``; empty where
            they stay in floating point.
        report: facts about the head after ``quantize``, ``None`` where nothing was tried.
        layer: facts about its input, likewise.
    """

    def __init__(self, structure: Structure, recipe: Recipe, selection: Selection) -> None:
        """Finds the head. ``selection`` says why it stays in floating point, or no longer says so.

        Raises:
            SmoothQuantError: the recipe insists on a head in 8 bits, and that cannot be had.
        """
        self.structure, self.recipe, self.selection = structure, recipe, selection
        self.modules: dict[str, nn.Module] = {}
        self.report: HeadReport | None = None
        self.layer: LayerReport | None = None
        self._inputs = _Inputs()
        self._head = self._wanted()
        self._needs_one_token = False
        if self._head is not None:
            with hooked(self.watched, before=_last_token):
                outcome = attempt(partial(run_model, structure.model, structure.batch), structure.model)
            self._needs_one_token = not isinstance(outcome, Failed)

    @property
    def watched(self) -> dict[str, nn.Module]:
        """The head that is to be quantized, by its name; nothing if there is none."""
        return {} if self._head is None else {self._head.name: self.structure.model.get_submodule(self._head.name)}

    @contextmanager
    def collecting(self, data: CalibrationData) -> Iterator[None]:
        """Takes statistics of what the head reads until the ``with`` body, which draws all data, ends.

        Then the head computes one token's logits only, if that is enough for the rest of the model.
        """

        def collect(name: str, args: Any, kwargs: Any) -> Any:
            self._inputs.add(first_argument(args, kwargs).detach(), data.last_is_held_out)
            return _last_token(name, args, kwargs) if self._needs_one_token else None

        with hooked(self.watched, before=collect):
            yield

    def quantize(
        self,
        held_out: Sequence[Batch],
        placement: Placement,
        progress: Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]],
    ) -> None:
        """Quantizes the head and measures on held-out data what that costs; the model is left as it is.

        With ``"auto"`` the head stays in floating point if that is too much.

        Raises:
            SmoothQuantError: the recipe insists on a head in 8 bits, and it did not run, or the model fails with it.
        """
        head, model = self._head, self.structure.model
        absmax, hessian = self._inputs.absmax, self._inputs.hessian
        if head is None:
            return
        if absmax is None or hessian is None:
            self._leave("it never ran during calibration")
            return
        linear, scheme = as_linear(model.get_submodule(head.name)), head_scheme(self.recipe.resolved_scheme)
        weight = weight_nk(linear)
        smooth = torch.ones_like(absmax)
        if self.recipe.smooth:
            columns = torch.stack([column_absmax(rows, scheme) for rows in weight.split(_rows(weight))]).amax(0)
            smooth = smoothing_scale(absmax, columns, scheme.alpha)
        rotate = block_size(len(smooth)) if scheme.dtype in ROTATED_DTYPES else 0
        if head.embedding and scheme.dtype == torch.int8:
            smooth = torch.maximum(smooth, _floor(smooth, weight, rotate))
        layer = _quantized(linear, scheme, smooth, rotate, hessian)
        modules: dict[str, nn.Module] = {head.name: layer}
        if head.embedding:
            modules[head.embedding] = W8A8Embedding(layer, torch.tensor([head.factor]).to(weight))
        if not self.recipe.smooth:
            layer.smooth = None
        try:
            with placement.running(self.structure), untouched(model):
                short = [probe_batch(batch, tokens=MOST_TOKENS) for batch in held_out]  # their logits are large
                kl = added_kl(model, head, modules, short, progress("Measuring the head"))
        except SmoothQuantError as error:
            self._leave(f"with it {error}")
            return
        if not math.isfinite(kl):
            self._leave("with it the predictions are not finite")
            return
        self.report = HeadReport(head.name, head.embedding, kl)
        alpha = scheme.alpha if self.recipe.smooth else None
        is_static = self.recipe.resolved_scheme.is_static
        self.layer = LayerReport(absmax.cpu(), (absmax / smooth).cpu(), alpha, per_token=is_static)
        if self.recipe.head == AUTO and kl > MOST_ADDED_KL:
            self._leave(f"in 8 bits it alone costs a KL divergence of {kl:.2g} nats a token")
            return
        self.modules = modules
        del self.selection.skipped[head.name]

    def _wanted(self) -> Head | None:
        if self.recipe.head == FLOAT:
            return None
        try:
            head = find_head(self.structure)
            reason = self.selection.skipped[head.name]
            if reason == OUTPUT_EMBEDDING:
                scheme = head_scheme(self.recipe.resolved_scheme)
                choose_format(None, [scheme], self.recipe.smooth, shared=bool(head.embedding))
                check_finite_weights({head.name: self.structure.model.get_submodule(head.name)})
                return head
        except (NoHead, SmoothQuantError) as error:
            reason = str(error)
        self._leave(reason)
        return None

    def _leave(self, reason: str) -> None:
        """Leaves the head in floating point, if the recipe lets it."""
        if self.recipe.head != AUTO:
            raise SmoothQuantError(f"the output embedding cannot run in 8 bits: {reason}; use --head float")
        for name, why in self.selection.skipped.items():
            if why == OUTPUT_EMBEDDING:
                self.selection.skipped[name] = f"{OUTPUT_EMBEDDING}: {reason}"


class _Inputs:
    """The statistics of what a head reads: from the windows that are not held out, if there are such.

    Attributes:
        absmax: fp32 [K], largest magnitude of each channel; ``None`` if there was no token.
        hessian: fp32 [K, K], sum of ``x x^T`` over the tokens, likewise.
    """

    def __init__(self) -> None:
        self.absmax: Tensor | None = None
        self.hessian: Tensor | None = None
        self._is_held_out = True

    def add(self, x: Tensor, is_held_out: bool) -> None:
        """Adds x [..., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows) or (is_held_out and not self._is_held_out):
            return
        if self.absmax is None or self.hessian is None or is_held_out != self._is_held_out:
            self.absmax, self.hessian, self._is_held_out = rows.abs().amax(0), rows.t() @ rows, is_held_out
            return
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        self.hessian.addmm_(rows.t(), rows)


def _last_token(_name: str, args: Any, kwargs: Any) -> Any:
    return with_first_argument(args, kwargs, first_argument(args, kwargs)[..., -1:, :])


def head_scheme(scheme: Scheme) -> Scheme:
    """That of a head: the finest scales of the recipe's dtype."""
    return replace(scheme.per_token, weight="channel") if scheme.weight != "channel" else scheme.per_token


def _quantized(linear: Linear, scheme: Scheme, smooth: Tensor, rotate: int, hessian: Tensor) -> W8A8Linear:
    """The 8-bit layer of a head whose input [..., K] it divides by ``smooth`` [K] and rotates."""
    weight = weight_nk(linear)
    hessian = rotate_blocks(rotate_blocks(hessian / smooth / smooth[:, None], rotate).t(), rotate)
    parts = [
        round_weight(rotate_blocks(rows * smooth, rotate), scheme, "gptq", hessian)
        for rows in weight.split(_rows(weight))
    ]
    rounded = torch.cat([q for q, _ in parts]), torch.cat([scale for _, scale in parts])
    return quantize_linear(linear, None, scheme, rounded, smooth, rotate)


def _rows(weight: Tensor) -> int:
    """How many rows of a weight are worked on at once."""
    return max(1, ELEMENTS // weight.shape[1])


def _floor(smooth: Tensor, weight: Tensor, rotate: int) -> Tensor:
    """The least ``smooth`` [K] with which the rows of the weight [V, K] still serve as embeddings.

    Rounding makes an error as large in every channel as the root mean square of all channels that are rotated together,
    times a constant. An embedding's channel is divided by ``smooth`` after that, so its error grows if this is small
    beside what smoothing made of the others.
    """
    size = torch.stack([rows.float().square().sum(0) for rows in weight.split(_rows(weight))]).sum(0).sqrt()
    block = rotate or len(smooth)

    def mean(values: Tensor) -> Tensor:
        return values.square().view(-1, block).mean(1).sqrt().repeat_interleave(block)

    floor = mean(size * smooth) / mean(size) / MOST_AMPLIFIED
    return torch.where(floor.isfinite(), floor, 0.0)
