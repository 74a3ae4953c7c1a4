"""RMS norms as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.grad import needs_grad
from ..nn.placement import has_ops
from ..probing.hooks import output_of
from ..probing.linears import values_of
from ..probing.numerics import same_elements

ROUNDINGS = 4  # of the row in the dtype of the activations: the division, a cast, a product and another cast


class FusedRMSNorm:
    """Mixed into the class of an RMS norm: one pass over the row where our ops run, the class's own elsewhere."""

    weight: Tensor
    fused_eps: float
    fused_offset: float

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[..., K] -> [..., K]; called with a gate too, as some norms may be, it is computed by its own class."""
        if len(args) == 1 and not kwargs:
            x: Tensor = args[0]
            if has_ops(x) and not needs_grad(x) and not needs_grad(self.weight):
                return ops.rms_norm(x, self.weight, self.fused_eps, self.fused_offset)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def rms_norm_attributes(module: nn.Module) -> dict[str, Any] | None:
    """eps and offset, if the module computes ``x / sqrt(mean(x * x) + eps) * (offset + weight)``; else ``None``."""
    weight = values_of(module, "weight")
    parameters = [name for name, _ in module.named_parameters()]
    if isinstance(module, FusedRMSNorm) or parameters != ["weight"] or weight is None or not _is_vector(weight):
        return None
    generator = torch.Generator().manual_seed(0)
    for eps in {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1}:
        # Rows so small that eps decides, rows of usual size, and a mean that a layer norm would take away.
        size = torch.tensor([[eps**0.5], [1.0], [30.0]])
        x = ((torch.randn(3, weight.numel(), generator=generator) + 0.5) * size).to(weight)
        for offset in (0.0, 1.0):
            if same_elements(output_of(module, x), ops.rms_norm(x, weight, eps, offset), ROUNDINGS):
                return {"fused_eps": eps, "fused_offset": offset}
    return None


def _is_vector(weight: Tensor) -> bool:
    return weight.dim() == 1 and has_ops(weight) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
