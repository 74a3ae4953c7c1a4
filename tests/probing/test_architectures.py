"""Smoothing and 8 bits on every architecture: outliers put in by hand are smoothed away, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import tiny
import torch
from discover_once import discover_once as discover_once  # a fixture
from expected_groups import EXPECTED, REJECTED, channels_of_values, last, map_behind_attention
from tiny import logits, relative_error
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from transformers import CONFIG_MAPPING, AutoModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from smoothquant_ext import Recipe, quantize
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization import pipeline
from smoothquant_ext.quantization.calibration import calibrate
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.reporting.outliers import smooth_

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, WIDTH = 64, 112, 4, 2, 16
CALIBRATION = [tiny.token_ids(seed=seed) for seed in range(2, 6)]
IDS = tiny.token_ids(seed=9)


class CausalLM(nn.Module):
    """What is around the blocks of the models below."""

    def __init__(self, make_block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(tiny.VOCAB, HIDDEN)
        self.layers = nn.ModuleList([make_block(), make_block()])
        self.output = nn.Linear(HIDDEN, tiny.VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        hidden = self.tok_embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.output(hidden))


def rotary(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** -torch.linspace(0, 1, WIDTH // 2)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class InternLM2Block(nn.Module):
    """As InternLM2 has it: q, k and v in one layer, by groups of heads that share a k and a v."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.wqkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * WIDTH, bias=False)
        self.wo = nn.Linear(HEADS * WIDTH, HIDDEN, bias=False)
        self.w1, self.w3 = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.wqkv(self.attention_norm(hidden)).view(batch, tokens, KV_HEADS, HEADS // KV_HEADS + 2, WIDTH)
        q = qkv[..., :-2, :].flatten(2, 3).transpose(1, 2)
        k, v = qkv[..., -2, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        mixed = scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True, enable_gqa=True)
        hidden = hidden + self.wo(mixed.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(hidden)
        return hidden + self.w2(silu(self.w1(normed)) * self.w3(normed))


class Calm(nn.Module):
    """A norm with 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class InventedBlock(nn.Module):
    """Like no model there is: channels of v, k and q alternate, and one norm feeds layers of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.calm = Calm()
        self.stir, self.pour = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.swell, self.shrink = Conv1D(2 * INTERMEDIATE, HIDDEN), Conv1D(HIDDEN, INTERMEDIATE)
        for layer in (self.swell, self.shrink):
            nn.init.normal_(layer.weight, std=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, tokens, _ = hidden.shape
        calm = self.calm(hidden)
        v, k, q = self.stir(calm).view(batch, tokens, HEADS, WIDTH, 3).transpose(1, 2).unbind(-1)
        mixed = 1.7 * scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
        up, gate = self.swell(calm).chunk(2, dim=-1)
        return hidden + 0.3 * (self.pour(mixed.transpose(1, 2).flatten(2)) + self.shrink(0.5 * up * gelu(gate)))


class GatedNorm(nn.Module):
    """A norm that is called with a gate too, as in Qwen3-Next."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * silu(gate)


class GatedBlock(nn.Module):
    """Of three factors from one layer, as LFM2 has them, any can be scaled, but only one."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.RMSNorm(HIDDEN), GatedNorm()
        self.three, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.gate, self.back = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        a, b, c = self.three(self.first_norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.out(a * (b * c).cumsum(dim=1))
        return hidden + self.back(self.second_norm(hidden, self.gate(hidden)))


class TextOfQwen2VL(nn.Module):
    """The language model in Qwen2-VL, which transformers has no causal LM for without the eyes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        config = CONFIG_MAPPING["qwen2_vl_text"](**tiny.SIZES, **tiny.LLAMA_LIKE, rope_parameters=rope)
        self.language_model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(HIDDEN, tiny.VOCAB, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        hidden = self.language_model(input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and the groups that each of its blocks has."""

    build: Callable[[], nn.Module]
    groups: dict[str, set[str]]
    norm_offset: float = 0.0


OTHERS = {
    "internlm2": Architecture(
        partial(CausalLM, InternLM2Block),
        {"attention_norm": {"wqkv"}, "wqkv": {"wo"}, "ffn_norm": {"w1", "w3"}, "w3": {"w2"}},
    ),
    "invented": Architecture(
        partial(CausalLM, InventedBlock),
        {"calm": {"stir", "swell"}, "stir": {"pour"}, "swell": {"shrink"}},
        norm_offset=1.0,
    ),
    "gated": Architecture(
        partial(CausalLM, GatedBlock), {"first_norm": {"three"}, "three": {"out"}, "second_norm": {"back"}}
    ),
    "qwen2_vl_text": Architecture(TextOfQwen2VL, EXPECTED["qwen2"]),
}
ONE_PLUS_WEIGHT = ("gemma", "gemma2", "gemma3_text")
ARCHITECTURES = OTHERS | {
    name: Architecture(partial(tiny.build, name), EXPECTED[name], float(name in ONE_PLUS_WEIGHT))
    for name in tiny.CONFIGS
}


@pytest.mark.parametrize("name", OTHERS)
def test_groups(name: str) -> None:
    discovery = discover(find_structure(OTHERS[name].build(), IDS))
    assert not discovery.rejected
    for block in {group.block for group in discovery.groups}:
        found = {last(g.producer): set(map(last, g.consumers)) for g in discovery.groups if g.block == block}
        assert found == OTHERS[name].groups
    assert len(discovery.groups) == 2 * len(OTHERS[name].groups)
    assert {g.norm_offset for g in discovery.groups if g.kind == "norm"} == {OTHERS[name].norm_offset}


@pytest.mark.parametrize("name", OTHERS)
def test_function_is_preserved(name: str) -> None:
    model = OTHERS[name].build().double()
    before = logits(model, IDS)
    structure = find_structure(model, IDS)
    absmax = calibrate(model, select_linears(structure, Recipe()).linears, CALIBRATION)
    smoothing = smooth_(structure, discover(structure).groups, absmax, Recipe())
    assert not smoothing.failed
    assert all(group.outlier_after != group.outlier_before for group in smoothing.groups)
    assert relative_error(model, before, IDS) < 1e-5  # fp32 inside norms and softmax


def test_channel_maps_of_packed_projections() -> None:
    assert map_behind_attention(OTHERS["internlm2"].build()) == channels_of_values(32 + 16, 64, 2)
    assert map_behind_attention(OTHERS["invented"].build()) == list(range(0, 3 * HIDDEN, 3))
    assert map_behind_attention(OTHERS["gated"].build()) == list(range(HIDDEN))


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outliers_are_smoothed_away(name: str, scheme: str) -> None:
    architecture = ARCHITECTURES[name]

    def error(amplified: bool, smooth: bool) -> float:
        model = architecture.build()
        expected = logits(model, IDS)
        if amplified:
            tiny.amplify_outliers(model, 300.0, 1, architecture.groups, architecture.norm_offset)
            assert relative_error(model, expected, IDS) < 1e-4  # fp32, amplified by two layers of random weights
        quantize(model, CALIBRATION, Recipe(scheme, smooth=smooth), progress=False)
        report = model.smoothquant_report
        producers = {last(group.producer) for group in report.groups} - {"up"}  # that one is within experts
        assert producers == (architecture.groups.keys() if smooth else set())
        assert set(map(last, report.failed)) == (REJECTED.get(name, set()) if smooth else set())
        return relative_error(model, expected, IDS)

    smoothed = error(amplified=True, smooth=True)
    # A channel 300 times the others costs them log2(300) = 8 bits, all they have. 3 leaves room for what outliers do
    # not touch: the error of static scales, and the layers whose input has none.
    assert smoothed < error(amplified=True, smooth=False) / 3
    # Amplified by f, a channel's s is f times what it was: the folded model is the same, up to the few rows whose
    # largest weight stood in that channel. An expert chosen otherwise is a leap, so 1.5.
    assert smoothed < 1.5 * error(amplified=False, smooth=True)


@pytest.mark.usefixtures("discover_once")
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_generating_gives_what_one_pass_without_fused_ops_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "fuse_", lambda model: [])
    plain = quantize(tiny.build(name), CALIBRATION, progress=False)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    length = {"max_new_tokens": 4, "min_new_tokens": 4}
    generated = fused.generate(**prompt, **length, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        expected = plain(generated.sequences[:, :-1], use_cache=False).logits[:, -4:]
    error = (torch.stack(generated.logits, dim=1) - expected).norm() / expected.norm()
    # Rounding in fp32, which may move a few activations by one of their 255 steps.
    assert error < 5e-3


def test_routers_and_gates_are_reported() -> None:
    skipped = select_linears(find_structure(tiny.build("qwen2_moe"), IDS), Recipe()).skipped
    assert skipped["model.layers.0.mlp.shared_expert_gate"] == "gate of one output"
    assert "is not a linear layer" in skipped["model.layers.0.mlp.gate"]
    assert "model.layers.0.mlp.experts" not in skipped
