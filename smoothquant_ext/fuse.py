"""Fusion: one-pass kernels in the place of a quantized model's RMS norms, gated MLPs and attention.

Norms and MLPs are found by what they compute. A fused module keeps its class, parameters, names and state dict: it
becomes an instance of a subclass of its own class whose forward calls one op. Whether it may is tested, not looked up:
the module is run on random input and its result compared with the op's formula, so that a module that computes anything
else stays as it is. Attention is exchanged through transformers' own interface for that, see ``attention``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .attention import use_attention_
from .linears import values_of
from .modules import W8A8Linear

# Roundings between the two computations: in the dtype of the activations, a cast, a product and another cast.
ROUNDINGS = 4


class FusedRMSNorm:
    """Mixed into the class of an RMS norm: one pass over the row on the CPU, the class's own forward elsewhere."""

    weight: Tensor
    fused_eps: float
    fused_offset: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., K]"""
        if hidden_states.is_cpu:
            return ops.rms_norm(hidden_states, self.weight, self.fused_eps, self.fused_offset)
        return super().forward(hidden_states)  # type: ignore[misc, no-any-return]


class FusedGatedMLP:
    """Mixed into the class of ``down(silu(gate(x)) * up(x))``: activation, product and quantization in one pass."""

    fused_roles: tuple[str, str, str]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., K] -> [..., K]"""
        gate, up, down = (getattr(self, role) for role in self.fused_roles)
        # An adapter in the place of `down`, or a hook on it, expects to be called.
        is_plain = type(down) is W8A8Linear and not down._forward_pre_hooks and not down._forward_hooks
        if not hidden_states.is_cpu or not is_plain:
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return ops.silu_mul_w8a8_linear(
            gate(hidden_states), up(hidden_states), down.weight, down.weight_scale, down.bias, down.input_scale
        )


def fuse_(model: nn.Module) -> list[str]:
    """Fuses what can be fused in a quantized model on the CPU, in place; the names of the modules that changed.

    Nothing else about the model changes: names, parameters and state dict stay, and so does the result, up to the
    rounding of intermediate values that the fused kernels keep in fp32. The attention of a transformers model is in the
    list as ``"attention"``, if it changed.
    """
    fused = []
    for name, module in list(model.named_modules()):
        attributes = rms_norm_attributes(module) or gated_mlp_attributes(module)
        if attributes is not None:
            mixin: type = FusedRMSNorm if "fused_eps" in attributes else FusedGatedMLP
            module.__class__ = _fused_class(mixin, type(module))  # type: ignore[arg-type]
            vars(module).update(attributes)
            fused.append(name)
    if use_attention_(model):
        fused.append("attention")
    return fused


@functools.cache
def _fused_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{base.__name__}", (mixin, base), {"__module__": __name__})


def rms_norm_attributes(module: nn.Module) -> dict[str, Any] | None:
    """eps and offset, if the module computes ``x / sqrt(mean(x * x) + eps) * (offset + weight)``; else ``None``."""
    weight = values_of(module, "weight")
    parameters = [name for name, _ in module.named_parameters()]
    if isinstance(module, FusedRMSNorm) or parameters != ["weight"] or weight is None or not _is_cpu_vector(weight):
        return None
    generator = torch.Generator().manual_seed(0)
    for eps in {value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1}:
        # Rows so small that eps decides, rows of usual size, and a mean that a layer norm would take away.
        size = torch.tensor([[eps**0.5], [1.0], [30.0]])
        x = ((torch.randn(3, weight.numel(), generator=generator) + 0.5) * size).to(weight.dtype)
        for offset in (0.0, 1.0):
            if _agrees(_output(module, x), ops.rms_norm(x, weight, eps, offset)):
                return {"fused_eps": eps, "fused_offset": offset}
    return None


def gated_mlp_attributes(module: nn.Module) -> dict[str, Any] | None:
    """The names of gate, up and down, if the module computes ``down(silu(gate(x)) * up(x))``; else ``None``."""
    linears = {name: child for name, child in module.named_children() if isinstance(child, W8A8Linear)}
    if isinstance(module, FusedGatedMLP) or len(linears) != 3 or len(list(module.modules())) > 5:
        return None
    if any(linear.weight.device.type != "cpu" for linear in linears.values()):
        return None
    for width in {linear.in_features for linear in linears.values()}:  # of the input, or of what is inside
        roles = _gated_mlp_roles(module, linears, width)
        if roles is not None:
            return {"fused_roles": roles}
    return None


def _gated_mlp_roles(module: nn.Module, linears: dict[str, W8A8Linear], width: int) -> tuple[str, str, str] | None:
    """Which linear layer is what, seen from their inputs and outputs in one run on noise [3, width]."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, args: Any, output: Tensor) -> None:
        inputs[name], outputs[name] = args[0], output

    handles = [child.register_forward_hook(functools.partial(record, name)) for name, child in linears.items()]
    noise = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    try:
        result = _output(module, noise.to(_float_dtype(module)))
    finally:
        for handle in handles:
            handle.remove()
    if result is None or set(outputs) != set(linears):
        return None
    one, other, down = outputs  # in the order in which they ran
    if inputs[one] is not inputs[other] or not torch.equal(outputs[down], result):
        return None
    for gate, up in ((one, other), (other, one)):
        if outputs[gate].shape != outputs[up].shape:
            return None
        if _agrees(inputs[down], nn.functional.silu(outputs[gate].float()) * outputs[up].float()):
            return gate, up, down
    return None


def _is_cpu_vector(weight: Tensor) -> bool:
    return weight.dim() == 1 and weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _float_dtype(module: nn.Module) -> torch.dtype:
    biases = [
        child.bias.dtype for child in module.modules() if isinstance(child, W8A8Linear) and child.bias is not None
    ]
    return biases[0] if biases else torch.float32


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x, or ``None`` if it is not a function of one tensor."""
    try:
        with torch.no_grad():
            output = module(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return output if isinstance(output, Tensor) else None


def _agrees(actual: Tensor | None, expected: Tensor) -> bool:
    """Equal within a few roundings of the narrower dtype, element by element."""
    if actual is None or actual.shape != expected.shape:
        return False
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
    actual, expected = actual.double(), expected.double()
    return torch.allclose(actual, expected, rtol=ROUNDINGS * eps, atol=ROUNDINGS * eps * float(expected.abs().mean()))
