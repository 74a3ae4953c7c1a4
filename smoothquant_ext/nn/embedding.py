"""The token embedding of a model whose output embedding, which it shares its weight with, has 8 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import SmoothQuantError
from ..hadamard import hadamard
from ..packing import unpack_rows
from ..traits import embedding_of
from .linear import W8A8Linear


class W8A8Embedding(nn.Module):
    """Reads the rows of the output embedding's 8-bit weight, so that a model stores its vocabulary once.

    The row of a token is ``turn(weight[token] * weight_scale[token]) / smooth * factor``: what the layer does to its
    input before it is quantized, explicit smoothing and a rotation, was done to its weight, and is undone.

    Attributes:
        factor: floating point [1], what the model multiplies embeddings by (Gemma: the root of their size). Its dtype
            is that of the result.
    """

    factor: nn.Parameter

    def __init__(self, head: W8A8Linear, factor: Tensor) -> None:
        """Makes the embedding of the output embedding ``head`` [V, D], with dynamic activations."""
        super().__init__()
        vars(self)["head"] = head  # it has a place of its own in the model, and is no part of this module
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.factor = nn.Parameter(factor, requires_grad=False)  # of the model's, it may be the only one left
        # No buffer, which a loader would look for in the files; it goes where the weight is at the next call.
        self._turn = hadamard(head.rotate) if head.rotate else None

    @property
    def head(self) -> W8A8Linear:
        """The output embedding."""
        layer: W8A8Linear = vars(self)["head"]
        return layer

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Token ids of any shape [...] -> [..., D].

        Raises:
            IndexError: there is no such token, as ``nn.Embedding`` raises it.
            SmoothQuantError: the output embedding's weight was offloaded.
        """
        return self._rows(input) * self.factor

    @property
    def weight(self) -> Tensor:
        """The weight [V, D] that ``nn.Embedding`` would have, computed anew each time."""
        return self._rows(torch.arange(self.num_embeddings, device=self.factor.device))

    def _rows(self, tokens: Tensor) -> Tensor:
        """Rows of the weight, [..., D] in the dtype of ``factor``."""
        head = self.head
        weight, scale = head.weight, head.weight_scale.expand(head.out_features, 1)
        if weight.is_meta and not tokens.is_meta:
            raise SmoothQuantError(
                "the output embedding, whose 8-bit weight is the token embedding's too, is offloaded; give a "
                "device_map that keeps it on a device"
            )
        tokens = tokens.to(weight.device)
        scales = functional.embedding(tokens, scale)  # which refuses tokens that there are none of
        if head.is_packed:
            rows = unpack_rows(weight, tokens, head.in_features)
        else:
            rows = weight.view(torch.int8)[tokens].view(weight.dtype)
        values = rows.float() * scales
        if self._turn is not None:
            if self._turn.device != values.device or self._turn.dtype != values.dtype:
                self._turn = self._turn.to(values)
            blocks = values.unflatten(-1, (-1, head.rotate)) @ self._turn
            values = blocks.flatten(-2) / math.sqrt(head.rotate)
        if head.smooth is not None:
            values = values / head.smooth
        return values.to(self.factor)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}"


def vocabulary_size(model: Any) -> int:
    """The number of tokens that a model's token embedding knows."""
    tokens = embedding_of(model, "input")
    size = getattr(tokens, "num_embeddings", None)  # not of one that PEFT has wrapped
    return int(tokens.weight.shape[0] if size is None else size)


def shares_head(model: nn.Module) -> bool:
    """Whether a model's token embedding reads its 8-bit output embedding."""
    return any(isinstance(module, W8A8Embedding) for module in model.modules())
