"""Experts of mixtures: how a module of them is read, and the 8-bit module that takes its place."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from op_testing import assert_same_bits, randn
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from smoothquant_ext import Recipe, SmoothQuantError, quantize, save
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.nn.experts import W8A8Experts
from smoothquant_ext.probing.experts import agrees, looks_like_experts, match_experts_layout, match_layouts
from smoothquant_ext.probing.linears import find_experts
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.convert import quantize_experts
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.reporting.profiler import profile_products
from smoothquant_ext.reporting.tables import render_report
from smoothquant_ext.scheme import SCHEMES

EXPERTS, K, INNER, N = 5, 24, 40, 24
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": functools.partial(gelu, approximate="tanh"), "relu": relu}
CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]


class Mixture(nn.Module):
    """Experts as some model might keep them."""

    def __init__(self, layout: str = "gate, up", activation: Any = silu, is_transposed: bool = False, bias: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.activation, self.is_transposed, self.bias = layout, activation, is_transposed, bias
        inner = INNER if layout in ("apart", "plain") else 2 * INNER
        names = {"first": (inner, K), "down": (N, INNER)} | ({"second": (inner, K)} if layout == "apart" else {})
        for name, (n, k) in names.items():
            shape = (EXPERTS, k, n) if is_transposed else (EXPERTS, n, k)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / k**0.5))
            if bias:
                self.register_parameter(name + bias, nn.Parameter(torch.randn(EXPERTS, n)))

    def layer(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        y = x @ (weight if self.is_transposed else weight.T)
        return y + getattr(self, name + self.bias)[expert] if self.bias else y

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        y = self.layer("first", expert, x)
        if self.layout == "plain":
            return self.activation(y)
        if self.layout == "apart":
            return self.activation(y) * self.layer("second", expert, x)
        first, second = (y[..., ::2], y[..., 1::2]) if "interleaved" in self.layout else y.chunk(2, dim=-1)
        return self.activation(first) * second if "gate, up" in self.layout else self.activation(second) * first

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros(len(x), N, dtype=x.dtype)
        for token in range(len(x)):
            for slot, expert in enumerate(index[token].tolist()):
                out = self.layer("down", expert, self.hidden(expert, x[token]))
                y[token] += weights[token, slot] * out
        return y


class Backwards(Mixture):
    """Counts its experts from the last one."""

    def layer(self, name: str, expert: int, x: Tensor) -> Tensor:
        return super().layer(name, EXPERTS - 1 - expert, x)


class Ranked(Mixture):
    """Expert i counts i times."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        return super().hidden(expert, x) * expert


class Clamped(Mixture):
    """As GPT-OSS: values are cut off, and 1 is added to those of up."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.layer("first", expert, x).chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)


class Limited(Mixture):
    """Cuts off what is far larger than usual."""

    def hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.layer("first", expert, x).chunk(2, dim=-1)
        return silu(gate.clamp(max=100.0)) * up


class Sorted(Mixture):
    """As Llama 4: called with the tokens of one expert after the other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        experts = len(self.first)
        rows = x.view(experts, -1, K)
        out = [self.layer("down", expert, self.hidden(expert, rows[expert])) for expert in range(experts)]
        return torch.cat(out)


LAYOUTS = ("gate, up", "up, gate", "interleaved gate, up", "interleaved up, gate", "apart", "plain")


def chosen(tokens: int, slots: int = 2, experts: int = EXPERTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(experts, generator=generator)[:slots] for _ in range(tokens)])
    return index, torch.rand(tokens, slots, generator=generator)


@pytest.mark.parametrize("bias", ["", "_bias"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, is_transposed: bool, bias: str) -> None:
    for name, activation in ACTIVATIONS.items():
        module = Mixture(layout, activation, is_transposed, bias)
        assert looks_like_experts(module)
        reading = match_experts_layout(module)
        assert reading is not None
        assert reading.activation == name
        assert (reading.up is None) == (layout == "plain")
        assert agrees(module, reading)
        # The 8-bit module is the float one up to 8 bits: no layer is mistaken for another.
        x, (index, weights) = randn(30, K), chosen(30)
        expected = module(x, index, weights)
        actual = quantize_experts(module, reading, SCHEMES["int8"])(x, index, weights)
        assert (actual - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("bias", ["", "_bias"])
def test_experts_whose_tokens_come_sorted(bias: str) -> None:
    module = Sorted("gate, up", is_transposed=True, bias=bias)
    reading = find_experts(nn.ModuleDict({"mlp": module}))["mlp"]
    assert reading is not None
    assert reading.is_sorted
    experts = quantize_experts(module, reading, SCHEMES["int8"])
    x = randn(3 * EXPERTS, K)
    x[::2] = 0  # tokens that are not for this expert
    expected, actual = module(x), experts(x)
    assert (actual - expected).norm() < 0.03 * expected.norm()
    assert bool(bias) or not actual[::2].any()
    assert_same_bits(actual[1:2], experts(x[1:2], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)))
    assert experts(x[:0]).shape == (0, N)
    with pytest.raises(TypeError, match="top_k_index and top_k_weights are missing"):
        made()(x)


def test_modules_are_read_without_their_weights() -> None:
    with torch.device("meta"):
        model = Mixture("interleaved up, gate", gelu)
        torch.set_default_dtype(torch.bfloat16)
        try:
            reading = match_experts_layout(model)
        finally:
            torch.set_default_dtype(torch.float32)
    assert reading is not None
    assert reading.activation == "gelu"
    assert reading.gate.rows == slice(1, None, 2)


def test_modules_of_one_class_and_other_sizes_are_read_anew() -> None:
    wide, narrow = Mixture(), Mixture()
    narrow.first = nn.Parameter(narrow.first.detach()[:, :INNER].clone())
    narrow.down = nn.Parameter(narrow.down.detach()[..., : INNER // 2].clone())
    readings = match_layouts({"wide": wide, "narrow": narrow, "again": wide})
    widths = {name: reading.gate.rows.stop for name, reading in readings.items() if reading is not None}
    assert widths == {"wide": INNER, "narrow": INNER // 2, "again": INNER}


@pytest.mark.parametrize("kind", [Ranked, Clamped, Limited])
def test_what_computes_something_else_is_not_read(kind: type[Mixture]) -> None:
    assert match_experts_layout(kind()) is None


def test_experts_in_another_order_are_seen_with_their_own_weights() -> None:
    # On random weights that all experts share the order does not show.
    module = Backwards()
    assert match_experts_layout(module) is not None
    assert find_experts(nn.ModuleDict({"mlp": module})) == {"mlp": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_are_read_in_every_dtype(dtype: torch.dtype) -> None:
    for name in ("mixtral", "qwen2_moe", "deepseek_v3-moe", "granitemoe"):
        found = find_experts(tiny.build(name, dtype))
        assert len(found) == 2
        assert all(reading is not None and reading.activation == "silu" for reading in found.values())


def test_other_modules_do_not_look_like_experts() -> None:
    modules = dict(tiny.build("llama").named_modules()) | {"convolution": nn.Conv1d(4, 4, 3), "nothing": nn.Module()}
    assert not any(looks_like_experts(module) for module in modules.values())


# --- the module -----------------------------------------------------------------------------------------------------


def made(scheme: str = "int8", bias: str = "", layout: str = "gate, up") -> W8A8Experts:
    module = Mixture(layout, bias=bias)
    reading = match_experts_layout(module)
    assert reading is not None
    return quantize_experts(module, reading, SCHEMES[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_has_every_expert_by_itself(scheme: str) -> None:
    experts, other = made(scheme, "_bias"), made(scheme, "_bias", "up, gate")
    assert experts.is_packed
    state = experts.state_dict()
    kinds = ("weight", "weight_scale", "bias")
    layers = ("gate_proj", "up_proj", "down_proj")
    assert set(state) == {f"{e}.{layer}.{kind}" for e in range(EXPERTS) for layer in layers for kind in kinds}
    assert state["2.gate_proj.weight"].shape == (INNER, K)
    assert state["2.down_proj.weight_scale"].shape == ((N, 1) if SCHEMES[scheme].weight == "channel" else (1,))
    x, (index, weights) = randn(9, K), chosen(9)
    expected = experts(x, index, weights)
    assert not torch.equal(other(x, index, weights), expected)
    other.load_state_dict(state)
    assert_same_bits(other(x, index, weights), expected)
    with pytest.raises(RuntimeError, match=r"1\.up_proj\.weight"):
        other.load_state_dict({name: value for name, value in state.items() if name != "1.up_proj.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*5\.up_proj\.weight"):
        other.load_state_dict(state | {"5.up_proj.weight": state["1.up_proj.weight"]})


def test_casts_and_copies() -> None:
    experts = made("fp8-static", "_bias")
    x, (index, weights) = randn(9, K), chosen(9)
    expected = experts(x, index, weights)
    for same in (copy.deepcopy(experts), made("fp8-static", "_bias").float()):
        assert_same_bits(same(x, index, weights), expected)
    int8 = made("int8")  # torch does not unpickle FP8 tensors
    assert_same_bits(pickle.loads(pickle.dumps(int8))(x, index, weights), int8(x, index, weights))
    half = copy.deepcopy(experts).half()
    assert half.gate.dtype == torch.float8_e4m3fn
    assert half.gate_scale.dtype == torch.float32
    assert half.gate_bias.dtype == torch.float16
    assert half(x.half(), index, weights.half()).dtype == torch.float16
    assert copy.deepcopy(experts).to("meta").gate.shape == (EXPERTS, INNER, K)
    assert "experts=5" in repr(experts)


def test_gradient_is_that_of_the_dequantized_experts() -> None:
    experts = made("int8", "_bias")
    index, weights = chosen(7)
    index[0, 0] = EXPERTS  # no expert
    x, weights = randn(7, K).requires_grad_(), weights.requires_grad_()
    y = experts(x, index, weights)
    assert_same_bits(y.detach(), experts(x.detach(), index, weights.detach()))
    y.square().sum().backward()
    mixture = Mixture("apart", bias="_bias")
    with torch.no_grad():
        for name, part in (("first", "gate"), ("second", "up"), ("down", "down")):
            for expert in range(EXPERTS):
                getattr(mixture, name)[expert] = experts.dequantized(part, expert, torch.float32)
            getattr(mixture, f"{name}_bias").copy_(getattr(experts, f"{part}_bias"))
    clean, shares = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    masked = torch.where(index == EXPERTS, 0, index)
    (mixture(clean, masked, torch.where(index == EXPERTS, 0.0, shares)) * 2 * y.detach()).sum().backward()
    # The same sums of fp32 numbers in another order.
    torch.testing.assert_close(x.grad, clean.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights.grad, shares.grad, rtol=1e-4, atol=1e-3)
    no_token = experts(torch.zeros(0, K, requires_grad=True), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert no_token.shape == (0, N)


# --- in models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe("int8-static"), Recipe("fp8-static"), Recipe("int8", alpha="auto")])
def test_recipes_on_a_model_with_experts(recipe: Recipe) -> None:
    model, ids = tiny.build("qwen2_moe"), tiny.token_ids(seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        quantize(model, CALIBRATION, recipe, progress=False)
        error = float((model(ids).logits - expected).norm() / expected.norm())
    report = model.smoothquant_report
    names = {f"model.layers.{layer}.mlp.experts" for layer in (0, 1)}
    assert names <= set(report.quantized)
    assert not names & set(report.unsmoothed)
    assert (names <= set(report.per_token)) == recipe.resolved_scheme.is_static
    assert error < 0.15  # as every architecture in test_quantize, and a half for e4m3, one bit less per step


def test_patterns_reach_experts() -> None:
    model = tiny.build("mixtral")
    first, second = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
    structure = find_structure(model, tiny.token_ids())
    selection = select_linears(structure, Recipe(skip=("layers.0.mlp.experts",)))
    assert selection.skipped[first] == "skipped by pattern"
    assert set(selection.experts) == {second}
    assert set(select_linears(structure, Recipe(only=("experts",))).experts) == {first, second}
    with pytest.raises(SmoothQuantError, match="matches no linear layer"):
        select_linears(structure, Recipe(skip=("layers.2.mlp.experts",)))


def test_experts_alone() -> None:
    model, ids = tiny.build("mixtral"), tiny.token_ids(seed=9)
    with torch.no_grad():
        expected = model(ids).logits
        quantize(model, CALIBRATION, Recipe(only=("experts",)), progress=False)
        error = float((model(ids).logits - expected).norm() / expected.norm())
    assert {name.rpartition(".")[2] for name in model.smoothquant_report.quantized} == {"experts"}
    assert 0 < error < 0.1


def test_damaged_experts_are_named() -> None:
    model = tiny.build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(SmoothQuantError, match=r"layers.1.mlp.experts.down_proj holds 1 non-finite"):
        quantize(model, CALIBRATION, progress=False)


def test_experts_that_cannot_be_read_stay_in_floating_point() -> None:
    sizes = tiny.LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "gpt_oss"}
    tiny_gpt_oss = {**tiny.CONFIGS, "gpt_oss": sizes}
    before = tiny.CONFIGS
    tiny.CONFIGS = tiny_gpt_oss
    try:
        model = tiny.build("gpt_oss")
    finally:
        tiny.CONFIGS = before
    quantize(model, CALIBRATION, progress=False)
    reason = "experts that compute something other than down(act(gate(x)) * up(x))"
    assert model.smoothquant_report.skipped["model.layers.0.mlp.experts"] == reason


def test_a_model_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    model = quantize(tiny.build("qwen2_moe"), CALIBRATION, Recipe("int8-static"), progress=False)
    save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert model_bytes(model).total == sum(tensor.nbytes for tensor in stored.values())
    assert "14 linear layers and the experts of 2 mixtures run in int8-static" in rendered(model)
    assert "With a scale per token, as experts always have: model.layers.*.mlp.experts (2)" in rendered(model)
    # The experts of a mixture are one entry of the configuration, however many there are.
    groups = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = [
        target for group in groups.values() for target in group["targets"] if ".experts" in target.replace("\\", "")
    ]
    assert targets == [rf"re:model\.layers\.{layer}\.mlp\.experts\.\d+\.\w+$" for layer in (0, 1)]
    products = profile_products(model, tiny.token_ids(rows=1))
    assert products.eight_bit["sq::w8a8_experts"] == 2
    assert not products.float_inside


def rendered(model: nn.Module) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_report(model.smoothquant_report))
    return console.export_text()


def test_outliers_within_experts_are_smoothed_away() -> None:
    ids = tiny.token_ids(seed=9)

    def error(smooth: bool, factor: float) -> float:
        model = tiny.build("qwen3_moe")
        for layer in model.model.layers:
            experts = layer.mlp.experts
            inner = experts.down_proj.shape[2]
            experts.gate_up_proj.data[:, inner + 3] *= factor  # up's
            experts.down_proj.data[:, :, 3] /= factor
        with torch.no_grad():
            expected = model(ids).logits
            quantize(model, CALIBRATION, Recipe(smooth=smooth, only=("experts",)), progress=False)
            groups = {group.producer for group in model.smoothquant_report.groups}
            names = {f"model.layers.{number}.mlp.experts.up" for number in (0, 1)}
            assert (names <= groups) == smooth
            assert not model.smoothquant_report.failed
            return float((model(ids).logits - expected).norm() / expected.norm())

    # As in test_architectures: a channel 300 times the others costs them all their bits.
    assert error(True, 300.0) < error(False, 300.0) / 3
    assert error(True, 300.0) < 1.5 * error(True, 1.0)


def test_experts_with_few_tokens_are_left_alone() -> None:
    model = tiny.build("qwen3_moe")
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    short = [tiny.token_ids(rows=1, tokens=8)]
    quantize(model, short, progress=False)
    failed = model.smoothquant_report.failed
    assert failed["model.layers.0.mlp.experts.up"] == "no expert was given 32 calibration tokens"
    experts = model.model.layers[0].mlp.experts
    for expert in range(4):
        dequantized = experts.dequantized("down", expert, torch.float32)
        assert bool(((dequantized - before[expert]).abs() <= 0.5001 * experts.down_scale[expert]).all())
