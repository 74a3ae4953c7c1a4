"""Oracle of the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gemm import mlp

__all__ = ["w8a8_experts"]


def w8a8_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    rotate: Sequence[int] = (),
) -> Tensor:
    """See ``ops.w8a8_experts``. Every expert computes every token; a token adds up those that it chose."""
    experts = weight[0].shape[0]

    def of_expert(expert: int) -> Tensor:
        """fp32 [..., N]"""
        weights = [each[expert] for each in weight]
        scales = [each.reshape(experts, -1)[expert] for each in weight_scale]
        biases = [None if each is None else each[expert] for each in bias or [None] * len(weight)]
        layers = list(zip(weights, scales, biases, strict=True))
        return mlp(x, layers, (None, None), activation, torch.float32, rotate)

    every = torch.stack([of_expert(expert) for expert in range(experts)])
    total = torch.zeros(every.shape[1:])
    for slot in range(top_k_index.shape[-1]):
        index, share = top_k_index[..., slot, None], top_k_weights[..., slot, None].float()
        chosen = every.gather(0, index.clamp(max=experts - 1).expand(total.shape).unsqueeze(0)).squeeze(0)
        total = torch.where(index < experts, total + share * chosen, total)
    return total.to(x.dtype)
