"""Fusion: what is recognized by its function, what must not be, and that nothing but speed changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from op_testing import HAS_CUDA
from torch import Tensor, nn

from smoothquant_ext import ops
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.fusion.linear import FusedLinear
from smoothquant_ext.fusion.mlp import FusedMLP
from smoothquant_ext.fusion.rms_norm import FusedRMSNorm
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.scheme import SCHEMES

WIDTH, INNER = 48, 80
ModuleType = Any  # a module, whose children mypy does not know


class RMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))
        self.epsilon, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (
            self.weight * wide.to(x.dtype) if self.offset == 0 else (wide * (self.offset + self.weight.float())).to(x)
        )


class NormWithoutMean(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class NormWithHiddenEps(RMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.epsilon = torch.tensor(1e-5)  # type: ignore[assignment]


class NormOfSquare(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12])
def test_rms_norm_is_recognized_with_its_eps_and_offset(offset: float, eps: float, dtype: torch.dtype) -> None:
    if eps < torch.finfo(dtype).tiny:
        eps = 1e-5
    norm = RMSNorm(offset, eps).to(dtype)
    plain = copy.deepcopy(norm)
    assert fuse_(nn.Sequential(norm)) == ["0"]
    assert isinstance(norm, FusedRMSNorm)
    assert isinstance(norm, RMSNorm)
    assert (norm.fused_eps, norm.fused_offset) == (eps, offset)
    x = torch.randn(2, 5, WIDTH).to(dtype) * 7
    torch.testing.assert_close(norm(x), plain(x), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "module", [NormWithoutMean(), NormWithHiddenEps(), NormOfSquare(), nn.LayerNorm(WIDTH), nn.PReLU(WIDTH)], ids=repr
)
def test_other_norms_stay(module: nn.Module) -> None:
    assert fuse_(nn.Sequential(module)) == []


# name -> act(a, b), the input of the last layer
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda a, b: F.silu(a) * b,
    "up first": lambda a, b: a * F.silu(b),
    "gelu": lambda a, b: F.gelu(a) * b,
    "gelu_tanh": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "relu": lambda a, b: F.relu(a) * b,
}


class MLP(nn.Module):
    """A gated MLP with unusual names, and switches for what must not be fused."""

    def __init__(self, variant: str = "silu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.variant = variant
        # Registered in another order than they run.
        self.out = nn.Linear(INNER, WIDTH)
        self.b = nn.Linear(WIDTH, INNER)
        self.a = nn.Linear(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        if self.variant in GATED:
            return self.out(GATED[self.variant](self.a(x), self.b(x)))
        if self.variant == "tanh":
            return self.out(torch.tanh(self.a(x)) * self.b(x))
        if self.variant == "scaled":
            return 1.5 * self.out(F.silu(self.a(x)) * self.b(x))
        if self.variant == "residual":
            return self.out(F.silu(self.a(x)) * self.b(x)) + x
        assert self.variant == "two inputs"
        return self.out(F.silu(self.a(x)) * self.b(x + 1))


class PackedMLP(nn.Module):
    """Gate and up in one layer, of ``inner`` outputs each."""

    def __init__(self, variant: str = "gate first", inner: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.variant = variant
        self.both, self.out = nn.Linear(WIDTH, 2 * inner), nn.Linear(inner, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).chunk(2, dim=-1)
        return self.out(F.silu(first) * second if self.variant == "gate first" else first * F.silu(second))


class PlainMLP(nn.Module):
    def __init__(self, activation: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU()}[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.one(x)))


def quantized(module: ModuleType, scheme: str = "int8", dtype: torch.dtype = torch.float32) -> ModuleType:
    for name, linear in list(module.named_children()):
        if isinstance(linear, nn.Linear):
            absmax = torch.full((linear.in_features,), 3.0)
            module.set_submodule(name, quantize_linear(linear.to(dtype), absmax, SCHEMES[scheme]))
    return module


def quantized_mlp(variant: str, scheme: str = "int8") -> MLP:
    return quantized(MLP(variant), scheme)


def check_fused(mlp: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Fuses it, and compares with what it was."""
    plain = copy.deepcopy(mlp)
    assert fuse_(nn.Sequential(mlp)) == ["0"]
    assert isinstance(mlp, FusedMLP)
    x = torch.randn(3, 4, WIDTH).to(dtype)
    # The product is the same up to its rounding; that moves a value across a rounding boundary of the 8 bits now and
    # then, by one step of at most 2^-2 (e5m2) of the value itself.
    error = float((mlp(x) - plain(x)).float().norm() / plain(x).float().norm())
    assert error < 1e-2
    assert list(mlp.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["silu", "up first"])
def test_gated_mlp_is_recognized(variant: str, scheme: str) -> None:
    mlp = quantized_mlp(variant, scheme)
    check_fused(mlp)
    gate, up = ("a", "b") if variant == "silu" else ("b", "a")
    assert mlp.fused_roles == (gate, up, "out", "silu", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", [name for name in GATED if name != "up first"])
def test_the_activation_is_recognized(variant: str, dtype: torch.dtype) -> None:
    gated, plain = quantized(MLP(variant), dtype=dtype), quantized(PlainMLP(variant), dtype=dtype)
    check_fused(gated, dtype)
    check_fused(plain, dtype)
    assert gated.fused_roles == ("a", "b", "out", variant, False)
    assert plain.fused_roles == ("one", None, "two", variant, False)


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed for the CPU", "plain"])
@pytest.mark.parametrize("variant", ["gate first", "up first"])
def test_gate_and_up_in_one_layer_are_recognized(variant: str, is_packed: bool) -> None:
    mlp = quantized(PackedMLP(variant))
    if not is_packed:
        for layer in (mlp.both, mlp.out):
            layer._unpack_()
    check_fused(mlp)
    assert mlp.fused_roles == ("both", "both", "out", "silu", variant == "up first")
    x = torch.randn(2, WIDTH)
    before = mlp(x)
    mlp.both.weight_scale.mul_(2)  # views see it
    assert not torch.equal(mlp(x), before)


def test_a_packed_layer_that_cannot_be_cut_stays() -> None:
    assert fuse_(nn.Sequential(quantized(PackedMLP(inner=80)))) == []


@pytest.mark.parametrize("variant", ["tanh", "scaled", "residual", "two inputs"])
def test_other_mlps_stay(variant: str) -> None:
    assert fuse_(nn.Sequential(quantized_mlp(variant))) == []


def test_float_mlps_stay() -> None:
    mlp = MLP()
    assert "0" not in fuse_(nn.Sequential(mlp))  # its layers may be, each by itself
    assert not isinstance(mlp, FusedMLP)


def test_fusing_twice_changes_nothing() -> None:
    model = nn.Sequential(RMSNorm(), quantized_mlp("silu"))
    assert fuse_(model) == ["0", "1"]
    before = [type(module) for module in model.modules()]
    assert fuse_(model) == []
    assert [type(module) for module in model.modules()] == before


def test_a_quantized_model_is_fused_where_it_can_be() -> None:
    model = quantize(tiny.build("llama"), tiny.token_ids(), Recipe(), progress=False)
    layer = ["input_layernorm", "mlp", "post_attention_layernorm", "mlp.gate_proj+up_proj"]
    layer += ["self_attn.q_proj+k_proj+v_proj"]
    expected = {f"model.layers.{index}.{name}" for index in (0, 1) for name in layer} | {"model.norm"}
    expected |= {"model.layers.0", "model.layers.1"}
    expected |= {"lm_head"} if ops.fast_linear_rows() > 0 else set()
    assert set(model.smoothquant_report.fused) == expected | {"attention", "cache"}
    ids = tiny.token_ids(seed=9)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, before)
        narrow = copy.deepcopy(model).to(torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - before).norm() / before.norm()) < 0.1


# A model on "meta" computes nothing, but calls what it would call on a GPU.
@pytest.mark.parametrize("device", ["meta", *(["cuda"] if HAS_CUDA else [])])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_off_the_cpu_a_fused_model_runs_its_modules(device: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(tiny.build("llama"), tiny.token_ids(), Recipe(scheme=scheme), progress=False)
    ids = tiny.token_ids(seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        calls = []
        for op in ("attention", "linear", "rms_norm", "w8a8_decoder_layer_", "w8a8_mlp", "w8a8_linear_group"):
            monkeypatch.setattr(ops, op, lambda *_, op=op: calls.append(op))
        logits = model.to(device)(ids.to(device)).logits
    assert not calls
    assert (logits.device.type, logits.shape) == (device, expected.shape)
    if device == "cuda":
        # The norms and the attention of torch round elsewhere.
        assert float((logits.cpu() - expected).norm() / expected.norm()) < 0.05
        monkeypatch.undo()
        with torch.no_grad():
            assert torch.equal(model.to("cpu")(ids).logits, expected)


def test_what_takes_the_place_of_down_is_called() -> None:
    mlp = quantized_mlp("silu")
    plain = copy.deepcopy(mlp)
    fuse_(nn.Sequential(mlp))
    x = torch.randn(3, WIDTH)
    calls: list[Tensor] = []
    handle = mlp.out.register_forward_hook(lambda _module, _args, output: calls.append(output))
    assert torch.equal(mlp(x), plain(x))
    assert torch.equal(calls[0], plain(x))
    handle.remove()
    mlp.out = nn.Identity()
    plain.out = nn.Identity()
    assert torch.equal(mlp(x), plain(x))


def test_one_compiled_graph_serves_all_batch_sizes() -> None:
    model = quantize(tiny.build("llama"), tiny.token_ids(), Recipe(), progress=False)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend=count, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 8):
            x = torch.randn(rows, 7, 64)
            assert torch.equal(compiled(x), block(x))
    assert graphs == 1


@pytest.mark.skipif(ops.fast_linear_rows() == 0, reason="this CPU has no kernel for it")
def test_a_layer_in_floating_point_is_ours_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(64, 100).to(torch.bfloat16)
    plain = copy.deepcopy(head)
    assert fuse_(nn.Sequential(head)) == ["0"]
    assert isinstance(head, FusedLinear)
    assert isinstance(head, nn.Linear)
    calls: list[int] = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *rest: calls.append(x.shape[0]) or linear(x, *rest))
    most = ops.fast_linear_rows()
    for rows in (1, most, most + 1):
        x = torch.randn(rows, 64).to(torch.bfloat16)
        with torch.no_grad():
            torch.testing.assert_close(head(x), plain(x), rtol=2**-7, atol=1e-2)
    assert calls == [1, most]
    head(torch.randn(1, 64).to(torch.bfloat16)).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        assert head.float()(torch.randn(1, 64)).dtype == torch.float32
    assert len(calls) == 2
