"""Fusion tries modules out that raise what they like, count their calls and are called in any way."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from hostile_blocks import EXCEPTIONS
from tiny_w8a8 import quantized
from torch import Tensor, nn

from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.fusion.rms_norm import FusedRMSNorm
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.scheme import SCHEMES

WIDTH, INNER = 48, 80


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps, self.calls = nn.Parameter(torch.randn(WIDTH)), 1e-5, 0

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        self.calls += 1
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return y if gate is None else y * gate


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.calls = 0
        for name, k, n in (("gate", WIDTH, INNER), ("up", WIDTH, INNER), ("down", INNER, WIDTH)):
            setattr(self, name, quantize_linear(nn.Linear(k, n), None, SCHEMES["int8"]))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return scale * self.down(input=nn.functional.silu(self.gate(input=x)) * self.up(x))


def raising(base: type[Any], error: BaseException) -> Any:
    class Raising(base):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            super().forward(*args, **kwargs)
            raise error

    return Raising()


@pytest.mark.parametrize("base", [Norm, MLP])
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_what_raises_is_left_alone(base: type[Any], name: str) -> None:
    module = raising(base, EXCEPTIONS[name])
    kind = type(module)
    assert fuse_(module) == []
    assert type(module) is kind
    assert module.calls == 0
    assert not any(each._forward_hooks for each in module.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_interrupts_and_full_memory_go_through(error: BaseException) -> None:
    module = raising(Norm, error)
    with pytest.raises(type(error)):
        fuse_(module)
    assert module.calls == 0


@pytest.mark.parametrize("base", [Norm, MLP])
def test_fused_modules_can_be_called_as_before(base: type[Any]) -> None:
    plain, fused = base(), base()
    fused.load_state_dict(plain.state_dict())
    assert fuse_(fused) == [""]
    assert fused.calls == 0
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
    extra = {"gate": x} if base is Norm else {"scale": 0.5}
    with torch.no_grad():
        for args, kwargs in (((x,), {}), ((), {"x": x}), ((x,), extra), ((x, *extra.values()), {})):
            torch.testing.assert_close(fused(*args, **kwargs), plain(*args, **kwargs))


def test_8_bit_layers_can_be_called_by_name() -> None:
    layer = quantize_linear(nn.Linear(8, 4), None, SCHEMES["int8"])
    x = torch.randn(3, 8)
    assert torch.equal(layer(input=x), layer(x))
    assert torch.equal(layer(x=x), layer(x))
    with pytest.raises(TypeError, match="input is missing"):
        layer()


@pytest.mark.parametrize("name", ["KeyError", "AssertionError", "StopIteration", "Own"])
def test_a_model_that_fails_on_a_few_tokens_is_fused_module_by_module(name: str) -> None:
    """Groups of layers and whole decoder layers are seen in passes of the model: there are none then."""
    model = quantized("llama", names=[])
    ids = tiny.token_ids(1, 12)
    for path in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention = model.model.layers[0].self_attn
        setattr(attention, path, quantize_linear(getattr(attention, path), None, SCHEMES["int8"]))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits

    def refuse(_module: nn.Module, _args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] < 8:
            raise EXCEPTIONS[name]

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert not [each for each in fuse_(model) if "+" in each]
    assert all(layer.shared is None for layer in model.modules() if isinstance(layer, W8A8Linear))
    assert isinstance(model.model.norm, FusedRMSNorm)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
