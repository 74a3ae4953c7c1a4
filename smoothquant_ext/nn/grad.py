"""Whether a call needs gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_grad(x: Tensor) -> bool:
    """Whether somebody will ask for the gradient of what is computed from ``x``: fused ops have none."""
    return x.requires_grad and torch.is_grad_enabled()
