"""Whether a call needs gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_grad(x: Tensor) -> bool:
    """Whether autograd records what is computed from ``x``. Fused ops have no gradient."""
    return x.requires_grad and torch.is_grad_enabled()
