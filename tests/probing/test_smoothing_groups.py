"""Discovery: the groups that each architecture has, found by probing, and the ones it must not claim."""

from __future__ import annotations

import pytest
import tiny
import torch
from expected_groups import EXPECTED, REJECTED, channels_of_values, last, map_behind_attention
from torch import Tensor, nn

from smoothquant_ext.probing.norms import norm_offset
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure

HIDDEN, INTERMEDIATE = 64, 112


def test_every_architecture_has_its_groups_written_down() -> None:
    assert EXPECTED.keys() == tiny.CONFIGS.keys()


@pytest.mark.parametrize("model_type", EXPECTED)
def test_groups_of_an_architecture(model_type: str) -> None:
    discovery = discover(find_structure(tiny.build(model_type), tiny.token_ids()))
    blocks = sorted({group.block for group in discovery.groups})
    assert len(blocks) == 2
    for block in blocks:
        found = {last(g.producer): set(map(last, g.consumers)) for g in discovery.groups if g.block == block}
        assert found == EXPECTED[model_type]
    assert set(map(last, discovery.rejected)) == REJECTED.get(model_type, set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_groups_are_found_in_16_bits(dtype: torch.dtype) -> None:
    wide = discover(find_structure(tiny.build("llama"), tiny.token_ids())).groups
    narrow = discover(find_structure(tiny.build("llama", dtype), tiny.token_ids())).groups
    assert [(g.producer, sorted(g.consumers)) for g in narrow] == [(g.producer, sorted(g.consumers)) for g in wide]
    for a, b in zip(wide, narrow, strict=True):
        assert all(torch.equal(a.consumers[name], b.consumers[name]) for name in a.consumers)


# How the layer before attention lays out its values, for 4 heads of 16 channels: the first channel, the distance from
# one head of values to the next, and how many heads of the output read each.
VALUES = {
    "llama": (0, 16, 2),
    "phi3": (64 + 32, 16, 2),  # q, k, v
    "gpt2": (64 + 64, 16, 1),
    "mpt": (64 + 64, 16, 1),
    "bloom": (32, 48, 1),  # q, k, v of each head
    "gpt_neox": (32, 48, 1),
    "falcon": (64 + 16, 0, 1),  # one head of values for all
    "falcon-new": (32 + 16, 64, 2),  # q, q, k, v of each group of heads
    "falcon-sequential": (32, 48, 1),
    "deepseek_v2": (16, 32, 1),  # k without position, v of each head
    "deepseek_v3": (16, 32, 1),
}


@pytest.mark.parametrize("architecture", VALUES)
def test_channel_map_behind_attention(architecture: str) -> None:
    assert map_behind_attention(tiny.build(architecture)) == channels_of_values(*VALUES[architecture])


@pytest.mark.parametrize(("heads", "width"), [(8, 8), (32, 20)])
def test_channel_map_of_many_small_heads(heads: int, width: int) -> None:
    """Packed head by head, heads may be too many to try, and no power of two."""
    model = tiny.build("gpt_neox", hidden_size=heads * width, num_attention_heads=heads)
    assert map_behind_attention(model) == channels_of_values(2 * width, 3 * width, 1, heads, width)


@pytest.mark.parametrize("architecture", ["phi3", "glm"])
def test_channel_map_of_packed_gate_and_up(architecture: str) -> None:
    groups = {last(g.producer): g for g in discover(find_structure(tiny.build(architecture), tiny.token_ids())).groups}
    (up_map,) = groups["gate_up_proj"].consumers.values()
    assert up_map.tolist() == list(range(INTERMEDIATE, 2 * INTERMEDIATE))


def test_more_channels_than_one_pass_can_name() -> None:
    model = tiny.build("llama", hidden_size=320, intermediate_size=5000, head_dim=80)
    groups = {last(g.producer): g for g in discover(find_structure(model, tiny.token_ids())).groups[:4]}
    (up_map,) = groups["up_proj"].consumers.values()
    assert up_map.tolist() == list(range(5000))


class Block(nn.Module):
    """A made-up block, with a switch for each way in which its norm's output could be misread as foldable."""

    def __init__(self, norm_also_feeds: str) -> None:
        super().__init__()
        self.norm_also_feeds = norm_also_feeds
        self.pre = nn.LayerNorm(HIDDEN)
        self.widen = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.narrow = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.pre(hidden)
        inner = torch.relu(self.widen(normed)) if self.norm_also_feeds != "gelu" else self.widen(normed)
        inner = torch.nn.functional.gelu(inner) if self.norm_also_feeds == "gelu" else inner
        out = self.narrow(inner)
        if self.norm_also_feeds == "residual":
            return normed + out
        if self.norm_also_feeds == "gate":
            return hidden + out * normed.mean(-1, keepdim=True).sigmoid()
        return hidden + out


class Model(nn.Module):
    """Two blocks around an embedding, with unusual names."""

    def __init__(self, norm_also_feeds: str = "nothing", shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(tiny.VOCAB, HIDDEN)
        first = Block(norm_also_feeds)
        self.tower = nn.ModuleList([first, first if shared else Block(norm_also_feeds)])
        if shared:
            self.tower[1] = Block(norm_also_feeds)
            self.tower[1].pre.weight = first.pre.weight
            self.tower[1].narrow.weight = first.narrow.weight
        self.final = nn.Linear(HIDDEN, tiny.VOCAB)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        hidden = self.table(input_ids)
        for block in self.tower:
            hidden = block(hidden)
        return self.final(hidden)


def found(model: nn.Module) -> set[tuple[str, str]]:
    return {
        (g.producer, consumer)
        for g in discover(find_structure(model, tiny.token_ids())).groups
        for consumer in g.consumers
    }


def test_an_architecture_nobody_has_seen() -> None:
    assert found(Model()) == {
        (f"tower.{i}.{a}", f"tower.{i}.{b}") for i in (0, 1) for a, b in (("pre", "widen"), ("widen", "narrow"))
    }


@pytest.mark.parametrize("reader", ["residual", "gate"])
def test_a_norm_that_something_else_reads_is_rejected_with_the_reason(reader: str) -> None:
    discovery = discover(find_structure(Model(reader), tiny.token_ids()))
    assert {g.producer for g in discovery.groups} == {"tower.0.widen", "tower.1.widen"}
    assert set(discovery.rejected) == {"tower.0.pre", "tower.1.pre"}
    assert "also read by something other than widen" in discovery.rejected["tower.0.pre"]


def test_a_linear_behind_gelu_is_not_claimed() -> None:
    assert found(Model("gelu")) == {("tower.0.pre", "tower.0.widen"), ("tower.1.pre", "tower.1.widen")}


def test_layers_that_share_a_weight_are_left_alone() -> None:
    """A fold into one user of a shared weight would change the other user."""
    assert found(Model(shared=True)) == set()


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.build("phi3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    discover(find_structure(model, tiny.token_ids()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Norm(nn.Module):
    """RMSNorm with a choice of what it does with its weight."""

    def __init__(self, gain: str) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        gains = {"w": self.weight, "1+w": 1 + self.weight, "w^2": self.weight**2, "exp": self.weight.exp()}
        return normed * gains[self.gain]


@pytest.mark.parametrize(("gain", "offset"), [("w", 0.0), ("1+w", 1.0), ("w^2", None), ("exp", None)])
def test_norm_offset(gain: str, offset: float | None) -> None:
    assert norm_offset(Norm(gain)) == offset
