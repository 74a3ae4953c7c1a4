"""Fusion: what is recognized by its function, what must not be, and that nothing but speed changes."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from smoothquant_ext.convert import quantize_linear
from smoothquant_ext.fuse import FusedGatedMLP, FusedRMSNorm, fuse_
from smoothquant_ext.quantize import quantize
from smoothquant_ext.scheme import SCHEMES, Recipe

WIDTH, INNER = 48, 80


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
        silu = nn.functional.silu
        if self.variant == "up first":
            up = self.b(x)
            return self.out(up * silu(self.a(x)))
        if self.variant == "gelu":
            return self.out(nn.functional.gelu(self.a(x)) * self.b(x))
        if self.variant == "scaled":
            return 1.5 * self.out(silu(self.a(x)) * self.b(x))
        if self.variant == "residual":
            return self.out(silu(self.a(x)) * self.b(x)) + x
        if self.variant == "two inputs":
            return self.out(silu(self.a(x)) * self.b(x + 1))
        return self.out(silu(self.a(x)) * self.b(x))


def quantized_mlp(variant: str, scheme: str = "int8") -> MLP:
    mlp = MLP(variant)
    for name in ("a", "b", "out"):
        width = getattr(mlp, name).in_features
        mlp.set_submodule(name, quantize_linear(getattr(mlp, name), torch.full((width,), 3.0), SCHEMES[scheme]))
    return mlp


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["silu", "up first"])
def test_gated_mlp_is_recognized(variant: str, scheme: str) -> None:
    mlp = quantized_mlp(variant, scheme)
    plain = copy.deepcopy(mlp)
    assert fuse_(nn.Sequential(mlp)) == ["0"]
    assert isinstance(mlp, FusedGatedMLP)
    assert mlp.fused_roles == ("a", "b", "out")
    x = torch.randn(3, 4, WIDTH)
    # The product is the same up to fp32 rounding; that moves a value across a rounding boundary of the 8 bits now and
    # then, by one step of at most 2^-2 (e5m2) of the value itself.
    error = float((mlp(x) - plain(x)).norm() / plain(x).norm())
    assert error < 1e-2
    assert list(mlp.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("variant", ["gelu", "scaled", "residual", "two inputs"])
def test_other_mlps_stay(variant: str) -> None:
    assert fuse_(nn.Sequential(quantized_mlp(variant))) == []


def test_float_mlps_stay() -> None:
    assert fuse_(nn.Sequential(MLP())) == []


def test_fusing_twice_changes_nothing() -> None:
    model = nn.Sequential(RMSNorm(), quantized_mlp("silu"))
    assert fuse_(model) == ["0", "1"]
    before = [type(module) for module in model.modules()]
    assert fuse_(model) == []
    assert [type(module) for module in model.modules()] == before


def test_a_quantized_model_is_fused_where_it_can_be() -> None:
    model = quantize(tiny.build("llama"), tiny.token_ids(), Recipe(), progress=False)
    layer = ["input_layernorm", "mlp", "post_attention_layernorm"]
    expected = {f"model.layers.{index}.{name}" for index in (0, 1) for name in layer} | {"model.norm"}
    assert set(model.smoothquant_report.fused) == expected | {"attention"}
    ids = tiny.token_ids(seed=9)
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, before)
        narrow = copy.deepcopy(model).to(torch.bfloat16)(ids).logits
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - before).norm() / before.norm()) < 0.1


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
