"""Size of a model in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of a model's weights: of its decoder blocks, and of the whole model."""

    decoder: int
    total: int


def model_bytes(model: nn.Module) -> ModelBytes:
    """Counts the bytes of a model's weights in a checkpoint: parameters and persistent buffers, tied ones once.

    An 8-bit layer counts as stored, [N, K] and scales, even if its weight in memory is packed for the CPU.
    """
    counted: set[int] = set()
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    decoder = total = 0
    for name, module in model.named_modules():
        size = _bytes_without_children(module, counted)
        total += size
        if any(name.startswith(f"{block_list}.") for block_list in lists):
            decoder += size
    return ModelBytes(decoder, total)


def _bytes_without_children(module: nn.Module, counted: set[int]) -> int:
    buffers = {k: v for k, v in module.named_buffers(recurse=False) if k not in module._non_persistent_buffers_set}
    if isinstance(module, W8A8Experts):
        stored = module.stored_bytes()
        buffers = {name: value for name, value in buffers.items() if name.endswith("_bias")}
    elif isinstance(module, W8A8Linear):
        del buffers["weight"], buffers["weight_scale"]
        scales = module.out_features if module.scheme.weight == "channel" else 1
        stored = module.in_features * module.out_features * module.scheme.dtype.itemsize + 4 * scales
    else:
        stored = 0
    for tensor in [*module.parameters(recurse=False), *buffers.values()]:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            stored += tensor.nbytes
    return stored
