"""The module that takes the place of the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import ACTIVATIONS
from ..hadamard import rotate_blocks
from ..probing.experts import sorted_routing
from ..scheme import Scheme
from .grad import needs_grad
from .linear import W8A8Linear

PARTS = ("gate", "up", "down")
NAMES: Mapping[str, str] = {part: f"{part}_proj" for part in PARTS}
"""Names of an expert's layers in checkpoints, where transformers defines no others."""


class W8A8Experts(nn.Module):
    """The experts of a mixture with 8-bit weights and activations, in the place of a module of transformers.

    Each is an MLP, ``down(act(gate(x)) * up(x))`` or ``down(act(gate(x)))``. Inputs have a scale per token. As in
    ``W8A8Linear``, weights are as checkpoints have them until ``prepack_``, scales stay fp32 and 8-bit weights are
    never cast. The state dict has the layers of every expert one by one, ``{expert}.{name}.weight`` and so on, as other
    tools write and read them.

    Attributes:
        gate, up, down: 8-bit [E, N, K], or packed; ``up`` may be ``None``.
        gate_scale, up_scale, down_scale: fp32 [E, N, 1] (per channel) or [E, 1] (per tensor).
        gate_bias, up_bias, down_bias: floating point [E, N], or ``None``.
        rotate: the sizes of the blocks of the input, and of what ``down`` reads, that are rotated, or 0, as in
            ``W8A8Linear``.
        names: what ``gate``, ``up`` and ``down`` are called in the state dict and in checkpoints.
    """

    gate: Tensor
    gate_scale: Tensor

    def __init__(
        self,
        layers: Mapping[str, tuple[Tensor, Tensor, Tensor | None]],
        activation: str,
        scheme: Scheme,
        is_sorted: bool = False,
    ) -> None:
        """Takes the 8-bit weights, the scales and the biases of ``gate``, ``down`` and perhaps ``up``.

        With ``is_sorted`` it is called as ``probing.experts.ExpertsLayout`` says.
        """
        super().__init__()
        self.activation, self.scheme, self.is_sorted = activation, scheme.per_token, is_sorted
        self.rotate = (0, 0)
        self.names = dict(NAMES)
        self.sizes = {part: tuple(layers[part][0].shape) for part in PARTS if part in layers}  # [E, N, K]
        for part in PARTS:
            for kind, value in zip(("", "_scale", "_bias"), layers.get(part, (None, None, None)), strict=True):
                self.register_buffer(f"{part}{kind}", value)

    @property
    def num_experts(self) -> int:
        return self.sizes["gate"][0]

    @property
    def is_packed(self) -> bool:
        return bool(self._buffers["gate"].dim() != 3)  # type: ignore[union-attr]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """[..., K], and experts and weights [..., slots] -> [..., N] in the dtype of ``hidden_states``.

        Sorted experts: [E * T, K] -> [E * T, N].
        """
        if top_k_index is None or top_k_weights is None:
            if not self.is_sorted:
                raise TypeError("W8A8Experts: top_k_index and top_k_weights are missing, expected both")
            has_bias = any(value is not None for name, value in self._buffers.items() if name.endswith("_bias"))
            top_k_index, top_k_weights = sorted_routing(hidden_states, self.num_experts, skips_zeros=not has_bias)
        if needs_grad(hidden_states) or needs_grad(top_k_weights):
            output: Tensor = _StraightThrough.apply(hidden_states, top_k_index, top_k_weights, self)
            return output
        return self.product(hidden_states, top_k_index, top_k_weights)

    def product(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The output, without a gradient."""
        own: dict[str, Any] = self._buffers
        layers = [ops.Layer(own[part], own[f"{part}_scale"], own[f"{part}_bias"]) for part in self.sizes]
        output: Tensor = ops.w8a8_experts(x, index, weights, *ops.as_lists(layers), self.activation, self.rotate)
        return output

    def prepack_(self) -> None:
        """Reorders the weights for the CPU kernels, in place of the plain ones. Does nothing off the CPU."""
        if self.is_packed or self.gate.device.type != "cpu":
            return
        for part, (experts, n, _) in self.sizes.items():
            self._buffers[part] = ops.prepack_weight(self._buffers[part])  # type: ignore[arg-type]
            scale: Any = self._buffers[f"{part}_scale"]
            self._buffers[f"{part}_scale"] = scale.reshape(experts, -1, 1).expand(experts, n, 1).contiguous()

    def stored_bytes(self) -> int:
        """Bytes of the 8-bit weights and their scales in a checkpoint."""
        per_channel = self.scheme.weight == "channel"
        return sum(
            experts * (n * k * self.scheme.dtype.itemsize + 4 * (n if per_channel else 1))
            for experts, n, k in self.sizes.values()
        )

    def layers(self) -> Iterator[tuple[str, W8A8Linear]]:
        """The layers of every expert by their names here, each a view of what is stored for all."""
        for expert in range(self.num_experts):
            for part, (_, n, k) in self.sizes.items():
                layer = W8A8Linear(k, n, False, self.scheme, device="meta")
                for kind, own in (("weight", part), ("weight_scale", f"{part}_scale"), ("bias", f"{part}_bias")):
                    value = self._buffers[own]
                    layer._buffers[kind] = None if value is None else value[expert]
                layer.rotate = self.rotate[part == "down"]
                yield f"{expert}.{self.names[part]}", layer

    def dequantized(self, part: str, expert: int, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] of one layer of one expert, in floating point."""
        return self._plain(part, expert).to(dtype) * self._scale(part)[expert].reshape(-1, 1).to(dtype)

    def _plain(self, part: str, expert: int) -> Tensor:
        _, n, k = self.sizes[part]
        weight: Tensor = self._buffers[part][expert]  # type: ignore[index]
        return ops.unpack_weight(weight, n, k) if self.is_packed else weight

    def _scale(self, part: str) -> Tensor:
        """The scales as checkpoints store them; packing spreads a per-tensor scale over the channels."""
        scale: Tensor = self._buffers[f"{part}_scale"]  # type: ignore[assignment]
        return scale[:, 0] if self.is_packed and self.scheme.weight == "tensor" else scale

    def _unpack_(self) -> None:
        if self.is_packed:
            plain = {
                part: torch.stack([self._plain(part, expert) for expert in range(self.num_experts)])
                for part in self.sizes
            }
            scales = {f"{part}_scale": self._scale(part) for part in self.sizes}
            self._buffers.update(plain | scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> W8A8Experts:
        # As W8A8Linear: only biases are cast, and the packed layout is the CPU's own.
        source, target = self.gate.device, fn(self.gate_scale).device
        if target.type != "cpu":
            self._unpack_()
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                keeps_dtype = not name.endswith("_bias") and moved.dtype != buffer.dtype
                self._buffers[name] = buffer.to(moved.device) if keeps_dtype else moved
        if source.type not in ("cpu", "meta"):
            self.prepack_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, layer in self.layers():
            layer._save_to_state_dict(destination, f"{prefix}{name}.", keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        was_packed = self.is_packed
        self._unpack_()
        known = set()
        for name, layer in self.layers():  # views: what is copied into them arrives here
            arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            layer._load_from_state_dict(state_dict, f"{prefix}{name}.", *arguments)
            known |= {f"{prefix}{name}.{key}" for key in layer._buffers}
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        if was_packed:
            self.prepack_()

    def extra_repr(self) -> str:
        _, n, k = self.sizes["gate"]
        return (
            f"experts={self.num_experts}, in_features={k}, inner={n}, activation={self.activation}, "
            f"scheme={self.scheme.name}, packed={self.is_packed}"
            + (f", rotate={self.rotate}" if any(self.rotate) else "")
        )


def as_experts(module: nn.Module) -> W8A8Experts:
    """The same module, for the type checker."""
    return cast(W8A8Experts, module)


class _StraightThrough(torch.autograd.Function):
    """Experts whose gradient passes the rounding of their inputs unchanged; the experts have nothing to train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weights: Tensor, experts: W8A8Experts) -> Tensor:
        """[..., K] -> [..., N]"""
        ctx.save_for_backward(x, index, weights)
        ctx.experts = experts
        return experts.product(x.detach(), index, weights.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        """[..., N] -> [..., K], and for the weights of the slots"""
        x, index, weights = ctx.saved_tensors
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        with torch.enable_grad():
            y = in_floating_point(ctx.experts, x, index, weights)
        if not y.requires_grad:  # no token, or none with an expert
            return torch.zeros_like(x), None, torch.zeros_like(weights), None
        to_x, to_weights = torch.autograd.grad(y, (x, weights), grad)
        return to_x, None, to_weights, None


def in_floating_point(experts: W8A8Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The output of the experts with dequantized weights and unrounded inputs."""
    rows, slots = x.reshape(-1, x.shape[-1]), index.reshape(-1, index.shape[-1])
    y = rows.new_zeros(len(rows), experts.sizes["down"][1])
    for expert in slots.unique().tolist():
        if expert == experts.num_experts:
            continue
        token, slot = (slots == expert).nonzero(as_tuple=True)
        layers = {
            part: (experts.dequantized(part, expert, x.dtype), experts._buffers[f"{part}_bias"])
            for part in experts.sizes
        }

        def apply(part: str, values: Tensor, layers: Any = layers, expert: int = expert) -> Tensor:
            weight, bias = layers[part]
            return nn.functional.linear(values, weight, None if bias is None else bias[expert].to(values.dtype))

        of_input, of_hidden = experts.rotate
        read = rotate_blocks(rows[token], of_input).to(x.dtype)
        hidden = ACTIVATIONS[experts.activation](apply("gate", read))
        if "up" in layers:
            hidden = hidden * apply("up", read)
        share = weights.reshape(slots.shape)[token, slot, None].to(x.dtype)
        y = y.index_add(0, token, apply("down", rotate_blocks(hidden, of_hidden).to(hidden.dtype)) * share)
    return y.reshape(*x.shape[:-1], y.shape[-1])
