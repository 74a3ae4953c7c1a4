"""The scales of a checkpoint: what they must hold, and which of them nothing uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SmoothQuantError
from ..scheme import SMALLEST_SCALE
from .formats.base import TensorNames
from .reading import Checkpoint, CheckpointLayer, read_tensors

_DAMAGED = "the layer was quantized from damaged weights, quantize the model again"

# What other tools call scales of inputs, outputs and caches that no layer here has.
_OTHERS = frozenset(
    f"{kind}_scale" for kind in ("activation", "input", "output", "weight", "prob", "q", "k", "v", "kv")
) | {"weight_scale_inv", "input_scale_ub"}


def wrong_scale(scale: Tensor, weight: Callable[[], Tensor]) -> tuple[int, float] | None:
    """The first row whose weight scale is wrong, and that scale; ``None`` if all are right.

    A scale is finite and as large as ``SMALLEST_SCALE``. That of a row of zeros may be smaller, and 0: whatever it is,
    the output is the bias.

    Args:
        scale: of each row, or one for the whole weight.
        weight: gives the 8-bit weight [N, K]; called only if there is a doubt.
    """
    values = scale.float().reshape(-1)
    doubtful = _not_positive(values)
    if not doubtful.any():
        return None
    used = has_values(weight())
    used = used if len(values) > 1 else used.any().reshape(1)
    wrong = doubtful & (used | ~(values.isfinite() & (values >= 0)))
    row = int(wrong.int().argmax())
    return (row, float(values[row])) if bool(wrong[row]) else None


def is_positive(scale: Tensor | None) -> bool:
    """Whether a scale of inputs, if there is one, is finite and as large as ``SMALLEST_SCALE`` everywhere."""
    return scale is None or not bool(_not_positive(scale).any())


def has_values(weight: Tensor) -> Tensor:
    """Whether each row of an 8-bit weight [N, K] holds anything but zeros; [N]."""
    sign = 0x7F if weight.dtype.is_floating_point else 0xFF  # FP8 has a zero of either sign
    return (weight.contiguous().view(torch.uint8) & sign).any(dim=1)


def check_scales(checkpoint: Checkpoint) -> None:
    """Reads every scale and zero point of the layers; they are a thousandth of the weights.

    Raises:
        SmoothQuantError: a scale is not positive and finite, or a zero point of something symmetric is not zero.
    """
    names, tensors = checkpoint.quantization.fmt.tensors, checkpoint.tensors
    of_weights = {f"{layer}.{names.weight_scale}": f"{layer}.weight" for layer in checkpoint.layers}
    for name, scale in read_tensors(tensors, of_weights):
        weight = of_weights[name]
        if (wrong := wrong_scale(scale, partial(_read, tensors[weight].file, weight))) is not None:
            row, value = wrong
            place = f" at row {row}" if scale.numel() > 1 else ""
            zero = ", or 0 for a row of zeros" if value == 0 else ""
            raise SmoothQuantError(
                f"{tensors[name].file}: {name} holds {value}{place}, expected positive finite numbers{zero}; {_DAMAGED}"
            )
    needed = {f"{layer}.{suffix}" for layer, of in checkpoint.layers.items() for suffix in _roles(of, names)}
    others = sorted(name for name in needed - of_weights.keys() if not is_zero_point(name))
    for name, scale in read_tensors(tensors, others):
        if (bad := _not_positive(scale)).any():
            raise SmoothQuantError(
                f"{tensors[name].file}: {name} holds {scale[bad].flatten()[0].item()}, expected positive finite "
                f"numbers; {_DAMAGED}"
            )
    # A suffix of None names no tensor.
    symmetric = [f"{layer}.{names.weight_zero_point}" for layer in checkpoint.layers]
    symmetric += [
        f"{layer}.{names.input_zero_point}"
        for layer, of in checkpoint.layers.items()
        if of.input_scale_shape is not None and of.zero_point_shape is None
    ]
    for name, zero_point in read_tensors(tensors, symmetric):
        if zero_point.any():
            raise SmoothQuantError(f"{tensors[name].file}: {name} is not zero, expected symmetric quantization")


def unused_scales(checkpoint: Checkpoint) -> dict[str, str]:
    """The names of the scales and zero points in the files that no layer uses, and the last part of each name."""
    names, layers = checkpoint.quantization.fmt.tensors, checkpoint.layers
    known = _OTHERS | {names.weight_scale, names.input_scale, names.smooth}
    unused = {}
    for name in checkpoint.tensors:
        layer, _, suffix = name.rpartition(".")
        if suffix not in known and not is_zero_point(name):
            continue
        if layer not in layers or suffix not in _roles(layers[layer], names):
            unused[name] = suffix
    return unused


def describe(suffixes: Mapping[str, str]) -> str:
    """``12 input_scale, 4 k_scale``, from ``unused_scales``."""
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(Counter(suffixes.values()).items()))


def _roles(layer: CheckpointLayer, names: TensorNames) -> list[str]:
    """The suffixes of the scales and zero points that a layer uses."""
    used = {
        names.weight_scale: True,
        names.input_scale: layer.input_scale_shape is not None,
        names.input_zero_point: layer.zero_point_shape is not None,
        names.smooth: layer.smooth,
    }
    return [suffix for suffix, is_used in used.items() if suffix is not None and is_used]


def _not_positive(scale: Tensor) -> Tensor:
    return ~(scale.isfinite() & (scale >= SMALLEST_SCALE))


def is_zero_point(name: str) -> bool:
    """Whether a tensor is a zero point by its name."""
    return name.endswith(("_zero_point", "_offset"))  # the second is Ascend's


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor
