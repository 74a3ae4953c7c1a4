"""A linear layer in floating point that uses the op for few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


class FusedLinear:
    """Mixed into the class of a linear layer in floating point: our op for a few bf16 rows on the CPU, its own else."""

    weight: Tensor
    bias: Tensor | None
    most_rows: int

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # its name in nn.Linear
        """[..., K] -> [..., N]"""
        x, weight = input, self.weight
        is_few = x.numel() <= self.most_rows * x.shape[-1]
        is_ours = x.is_cpu and weight.dtype == x.dtype == torch.bfloat16 and is_few
        if is_ours and not torch.is_grad_enabled():
            return ops.linear(x, weight, self.bias)
        return super().forward(x)  # type: ignore[misc, no-any-return]
