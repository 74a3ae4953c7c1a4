"""The modules that take the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..hadamard import rotate_blocks
from ..scheme import Scheme
from .grad import needs_grad
from .placement import ALIGNED_ROWS, joined


class Group(Protocol):
    """Layers that read the same input, see ``fusion.shared_input``."""

    def __call__(self, layer: W8A8Linear, x: Tensor) -> Tensor | None:
        """The layer's output for x; ``None`` where the layer has to compute it by itself."""

    def join_(self) -> None:
        """Joins the layers if they are together on a GPU, see ``join_``."""


class W8A8Linear(nn.Module):
    """A linear layer with 8-bit weights and 8-bit activations: ``y = x @ (weight * weight_scale).T + bias``.

    The weight is stored as torch stores it, [N, K], until ``prepack_`` reorders it for the CPU kernels; the state dict
    always shows [N, K]. Scales stay fp32 whatever dtype the model is cast to, and the 8-bit weight is never cast.

    Attributes:
        weight: 8-bit [N, K], or packed (see ``torch.ops.sq.prepack_weight``).
        weight_scale: fp32 [N, 1] (per channel) or [1] (per tensor); packed or joined always [N, 1].
        input_scale: fp32 [1] with static activations, else ``None`` (a scale per token, measured at run time).
        input_zero_point: fp32 [1], a whole number, with static asymmetric activations, else ``None``.
        smooth: fp32 [K] that the input is divided by before it is quantized, or ``None``; then ``weight`` is that of a
            layer whose columns were multiplied by it.
        bias: floating point [N], or ``None``.
        rotate: the size of the blocks of its input that are rotated before they are quantized (see
            ``ops.quantize_per_token``), or 0; then ``weight`` is that of a layer whose rows were rotated alike.
        shared: the group of layers that this one is computed together with, or ``None``.
    """

    shared: Group | None
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    smooth: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: Scheme,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes an uninitialized layer; ``dtype`` is the bias's, ``device`` may be ``"meta"``."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.rotate = 0
        self.shared = None
        self._summed: tuple[Tensor, Tensor] | None = None
        scale_shape = (out_features, 1) if scheme.weight == "channel" else (1,)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=scheme.dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(scale_shape, dtype=torch.float32, device=device))
        input_scale = torch.empty(1, dtype=torch.float32, device=device) if scheme.is_static else None
        self.register_buffer("input_scale", input_scale)
        zero_point = torch.empty(1, dtype=torch.float32, device=device) if input_scale is not None else None
        self.register_buffer("input_zero_point", None if scheme.symmetric else zero_point)
        self.register_buffer("smooth", None)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:  # noqa: A002
        """[..., K] -> [..., N] in the dtype of ``x``. Its gradient is that of the dequantized weight.

        By name ``x`` may be given as ``input`` too, as it is called in ``nn.Linear``.
        """
        x = input if x is None else x
        if x is None:
            raise TypeError("W8A8Linear: the input is missing")
        if needs_grad(x):
            output: Tensor = StraightThrough.apply(x, self)
            return output
        if self.shared is not None and (y := self.shared(self, x)) is not None:
            return y
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The output, computed alone, without a gradient."""
        if not self.scheme.symmetric:
            return asymmetric_linear(self, x)
        buffers: dict[str, Any] = self._buffers  # an attribute of a module costs as much as a small kernel
        return ops.w8a8_linear(
            x,
            buffers["weight"],
            buffers["weight_scale"],
            buffers["bias"],
            buffers["input_scale"],
            buffers["smooth"],
            rotate=self.rotate,
        )

    @property
    def tensors(self) -> ops.Layer:
        """Weight, scale and bias, as the ops of several layers take them."""
        buffers: dict[str, Any] = self._buffers
        return ops.Layer(buffers["weight"], buffers["weight_scale"], buffers["bias"])

    @property
    def is_plain(self) -> bool:
        """Whether fused ops can quantize its input, once it is rotated: it is not smoothed, and symmetric."""
        return self.smooth is None and self.scheme.symmetric

    def is_with(self, x: Tensor) -> bool:
        """Whether the layer is on x's device."""
        return self._buffers["weight"].device == x.device  # type: ignore[union-attr]

    @property
    def is_packed(self) -> bool:
        return self.weight.dim() != 2

    def prepack_(self) -> None:
        """Reorders the weight for the CPU kernels, in place of the plain one. Does nothing off the CPU."""
        if self.is_packed or self.weight.device.type != "cpu":
            return
        self.weight = ops.prepack_weight(self.weight)
        self.weight_scale = self.weight_scale.expand(self.out_features, 1).contiguous()

    def plain_weight(self) -> Tensor:
        """The weight as [N, K], 8 bits, whether or not it is packed."""
        return ops.unpack_weight(self.weight, self.out_features, self.in_features) if self.is_packed else self.weight

    def weight_sum(self) -> Tensor:
        """fp32 [N]: the sum of each row of the dequantized weight, computed once for a weight."""
        if self._summed is None or self._summed[0] is not self.weight:
            weight = self.plain_weight()
            exact = weight.sum(1, dtype=torch.int32) if weight.dtype == torch.int8 else weight.float().sum(1)
            self._summed = self.weight, exact.float() * self._plain_scale().reshape(-1)
        return self._summed[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Linear:
        # Casts (.half(), .to(bfloat16)) are for the bias alone: scales are fp32 and the weight is 8 bits by contract.
        # The packed layout is the CPU kernels' own: a move off the CPU unpacks, a move back to it packs.
        source, target = self.weight.device, fn(self.weight_scale).device
        if target.type == "cuda":
            ops.settle(target.index)  # now, rather than while a graph is captured
        if target.type != "cpu":
            self._unpack_()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                keeps_dtype = name != "bias" and moved.dtype != buffer.dtype
                self._buffers[name] = buffer.to(moved.device) if keeps_dtype else moved
        self._summed = None  # it would keep a weight where it was
        if source.type not in ("cpu", "meta"):
            self.prepack_()
        if self.shared is not None:
            self.shared.join_()
        return self

    def _unpack_(self) -> None:
        """Undoes ``prepack_``, and what ``join_`` did to the scale."""
        if self._has_spread_scale:
            self.weight_scale = self._plain_scale()
        if self.is_packed:
            self.weight = self.plain_weight()

    def _plain_scale(self) -> Tensor:
        """The weight's scale as checkpoints store it; packing and joining spread that of a tensor over the channels."""
        return self.weight_scale[0].clone() if self._has_spread_scale else self.weight_scale

    @property
    def _has_spread_scale(self) -> bool:
        scale = self._buffers.get("weight_scale")  # under another name while a checkpoint is loaded
        return self.scheme.weight == "tensor" and scale is not None and scale.dim() == 2

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[prefix + "weight"] = self.plain_weight()
        if self._has_spread_scale:
            destination[prefix + "weight_scale"] = self._plain_scale()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        was_packed = self.is_packed
        self._unpack_()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._summed = None
        if was_packed:
            self.prepack_()
        if self.shared is not None:
            self.shared.join_()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, packed={self.is_packed}" + (f", rotate={self.rotate}" if self.rotate else "")
        )


class StraightThrough(torch.autograd.Function):
    """An 8-bit layer whose gradient passes the rounding of its input unchanged (Bengio et al. 2013, section 4).

    It lets adapters before the layer be trained; the layer itself has nothing to train.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: W8A8Linear) -> Tensor:
        """[..., K] -> [..., N]"""
        ctx.layer = layer
        return layer.product(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[..., N] -> [..., K]"""
        layer: W8A8Linear = ctx.layer
        weight = layer.plain_weight().to(grad.dtype)
        gradient = (grad * layer._plain_scale().reshape(-1).to(grad.dtype)) @ weight
        gradient = rotate_blocks(gradient, layer.rotate).to(grad.dtype)
        return (gradient if layer.smooth is None else gradient / layer.smooth.to(grad.dtype)), None


def asymmetric_linear(layer: W8A8Linear, x: Tensor) -> Tensor:
    """The output [..., N] of a layer with asymmetric activations: those of [low, high], by 255 steps around the middle.

    ``x = (x - middle) + middle``, of which the first part is symmetric, and the second the same for all columns:
    ``y = W (x - middle) + middle * sum(W, 1)``. With a stored scale s and zero point z, of q in [-128, 127], the range
    is ``[(-128 - z) s, (127 - z) s]``; without, that of each token.
    """
    x32 = rotate_blocks(x.float() if layer.smooth is None else x.float() / layer.smooth, layer.rotate)
    if layer.input_scale is None:
        low, high = x32.aminmax(dim=-1, keepdim=True) if x.shape[-1] else (x32.sum(-1, keepdim=True),) * 2
        middle, scale = (low + high) / 2, None
    else:
        assert layer.input_zero_point is not None
        middle = (-0.5 - layer.input_zero_point) * layer.input_scale
        scale = layer.input_scale * (127.5 / 127.0)
    x32 = x32 - middle
    y = ops.w8a8_linear(x32, layer.weight, layer.weight_scale, None, scale, None, torch.float32)
    y = y + middle * layer.weight_sum()
    return (y if layer.bias is None else y + layer.bias.float()).to(x.dtype)


def have_one_input_scale(layers: Sequence[W8A8Linear]) -> bool:
    """Whether an input quantized for one of these layers is right for all: no explicit smoothing, symmetric, rotated
    alike, and scales per token or the same static one.
    """
    if not all(layer.is_plain for layer in layers) or len({layer.rotate for layer in layers}) > 1:
        return False
    scales = [layer.input_scale for layer in layers]
    if scales[0] is None:
        return all(scale is None for scale in scales)
    return all(scale is not None and torch.equal(scale, scales[0]) for scale in scales)


def join_(layers: Sequence[W8A8Linear]) -> None:
    """Lays the tensors of layers on one GPU one after the other in memory, so that one product can compute them all.

    Each layer's tensors become slices of those of all; what they held before is freed. Does nothing on other devices,
    where that is so already, and where a layer's end would not be aligned as the next one's start has to be.
    """
    device = layers[0].weight.device
    if device.type != "cuda" or any(layer.weight.device != device for layer in layers):
        return
    if any(layer.out_features % ALIGNED_ROWS or layer.in_features % ALIGNED_ROWS for layer in layers):
        return
    for layer in layers:
        layer.weight_scale = layer.weight_scale.expand(layer.out_features, 1)
    for name in ("weight", "weight_scale", "bias"):
        parts = [part for layer in layers if (part := layer._buffers[name]) is not None]
        if len(parts) == len(layers) and len({part.dtype for part in parts}) == 1:  # biases are cast one by one
            for layer, part in zip(layers, joined(parts), strict=True):
                layer._buffers[name] = part
