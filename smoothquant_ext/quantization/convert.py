"""Conversion: makes the 8-bit modules that take the places of linear layers and experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .. import ops
from ..hadamard import rotate_blocks
from ..nn.experts import W8A8Experts
from ..nn.linear import W8A8Linear
from ..probing.experts import ExpertsLayout
from ..probing.hooks import replace_
from ..probing.linears import Linear, as_linear, weight_nk
from ..scheme import QMAX, SMALLEST_SCALE, Scheme


def convert_(
    model: nn.Module,
    names: Iterable[str],
    absmax: Mapping[str, Tensor],
    scheme: Scheme,
    rotated: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Replaces the named linear layers of ``model`` by ``W8A8Linear``, rounded to nearest, freeing each float weight.

    Args:
        model: the model, smoothed or not.
        names: the layers to convert, one at a time.
        absmax: fp32 [K] per layer: its calibrated (and smoothed) input. Layers that share an input have the same
            absmax and so the same static scale, as fused kernels and other engines require of q/k/v and gate/up.
        scheme: what to convert to.
        rotated: of layers whose input is rotated at run time the size of its blocks, by name.
    """
    for name in names:
        linear = as_linear(model.get_submodule(name))
        replace_(model, {name: quantize_linear(linear, absmax.get(name), scheme, rotate=rotated.get(name, 0))})


def convert_experts_(
    model: nn.Module, layouts: Mapping[str, ExpertsLayout], scheme: Scheme, rotated: Mapping[str, int]
) -> None:
    """Replaces the named experts of ``model`` by ``W8A8Experts``, freeing the float weights."""
    for name, layout in layouts.items():
        experts = quantize_experts(model.get_submodule(name), layout, scheme, rotation_of_experts(rotated, name))
        replace_(model, {name: experts})


def quantize_linear(
    linear: Linear,
    absmax: Tensor | None,
    scheme: Scheme,
    rounded: tuple[Tensor, Tensor] | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
) -> W8A8Linear:
    """An 8-bit copy of a linear layer, ready to run.

    Args:
        linear: a layer with a floating-point weight [N, K].
        absmax: fp32, the largest magnitude of its input as it is quantized, whole or per channel: needed for static
            activations only.
        scheme: what to convert to.
        rounded: its 8-bit weight [N, K], rotated, and scale; rounded to nearest if not given.
        smooth: fp32 [K] that the layer has to divide its input by, or ``None``.
        rotate: the size of the blocks of its input that the layer has to rotate, or 0.
    """
    weight = weight_nk(linear)
    out_features, in_features = weight.shape
    module = W8A8Linear(in_features, out_features, False, scheme, device="meta")
    module.weight, module.weight_scale = (
        quantize_weight(rotate_blocks(weight, rotate), scheme) if rounded is None else rounded
    )
    module.rotate = rotate
    if scheme.is_static:
        assert absmax is not None
        module.input_scale = static_scale(absmax, scheme.dtype).to(weight.device)
    if smooth is not None:
        module.smooth = smooth.to(weight.device)
    if linear.bias is not None:
        module.bias = linear.bias.detach().clone()
    module.prepack_()
    return module


def rotation_of_experts(rotated: Mapping[str, int], name: str) -> tuple[int, int]:
    """``W8A8Experts.rotate`` of the experts ``name``, from ``Rotations.inputs``."""
    return rotated.get(name, 0), rotated.get(f"{name}.down", 0)


def quantize_experts(
    module: nn.Module, layout: ExpertsLayout, scheme: Scheme, rotate: tuple[int, int] = (0, 0)
) -> W8A8Experts:
    """An 8-bit copy of a mixture's experts, rounded to nearest, ready to run; inputs have a scale per token.

    ``rotate`` is that of ``W8A8Experts``.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    layers = {}
    for name, part in layout.parts.items():
        weight, bias = part.weight(parameters), part.bias_of(parameters)
        turned = rotate_blocks(weight, rotate[name == "down"])
        rounded = [quantize_weight(expert, scheme) for expert in turned]
        stacked = torch.stack([q for q, _ in rounded]), torch.stack([scale for _, scale in rounded])
        layers[name] = *stacked, None if bias is None else bias.clone()
    experts = W8A8Experts(layers, layout.activation, scheme, layout.is_sorted)
    experts.rotate = rotate
    experts.prepack_()
    return experts


def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Rounds a weight [N, K] to nearest: 8-bit [N, K] and its fp32 scale, [N, 1] per channel or [1] per tensor.

    Where the scale would be below ``SMALLEST_SCALE``, it is 1 and the weight 0.
    """
    if scheme.weight == "channel":
        quantized, scale = ops.quantize_per_token(weight.contiguous(), scheme.dtype)
        negligible = scale < SMALLEST_SCALE
        quantized.view(torch.uint8)[negligible] = 0
        return quantized, scale.masked_fill(negligible, 1.0)[:, None]
    scale = static_scale(weight.abs().amax().float(), scheme.dtype)
    return ops.quantize_static(weight.contiguous(), scale, scheme.dtype), scale


def static_scale(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [1]: absmax / QMAX over the whole tensor, 1 if that is zero or next to it."""
    scale = absmax.max().float().reshape(1) / QMAX[dtype]
    return torch.where(scale >= SMALLEST_SCALE, scale, torch.ones_like(scale))
