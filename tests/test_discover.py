"""Discovery: the groups that each architecture has, found by probing, and the ones it must not claim."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from smoothquant_ext.discover import discover, norm_offset

HIDDEN, INTERMEDIATE = 64, 112

# For each architecture the producers of its first block, by the last part of their name, and what they feed.
# q/k/v -> attn, up/gate -> mlp and so on are worked out by hand from the model's forward.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "llama": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "phi3": {
        "input_layernorm": {"qkv_proj"},
        "qkv_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_up_proj"},
        "gate_up_proj": {"down_proj"},
    },
    "gemma2": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "pre_feedforward_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "olmo2": {"v_proj": {"o_proj"}, "up_proj": {"down_proj"}},
    "opt": {
        "self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"out_proj"},
        "final_layer_norm": {"fc1"},
        "fc1": {"fc2"},
    },
    "gpt2": {"ln_1": {"c_attn"}, "c_attn": {"c_proj"}, "ln_2": {"c_fc"}},
    "gpt_neox": {
        "input_layernorm": {"query_key_value"},
        "query_key_value": {"dense"},
        "post_attention_layernorm": {"dense_h_to_4h"},
    },
    "gptj": {"ln_1": {"q_proj", "k_proj", "v_proj", "fc_in"}, "v_proj": {"out_proj"}},
    "bloom": {
        "input_layernorm": {"query_key_value"},
        "query_key_value": {"dense"},
        "post_attention_layernorm": {"dense_h_to_4h"},
    },
    "falcon": {"input_layernorm": {"query_key_value", "dense_h_to_4h"}, "query_key_value": {"dense"}},
    "mixtral": {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "v_proj": {"o_proj"}},
}
for same_as_llama in ("mistral", "qwen2", "qwen3", "gemma", "stablelm"):
    EXPECTED[same_as_llama] = EXPECTED["llama"]


def last(name: str) -> str:
    return name.rpartition(".")[2]


@pytest.mark.parametrize("model_type", EXPECTED)
def test_groups_of_an_architecture(model_type: str) -> None:
    groups = discover(tiny.build(model_type), tiny.token_ids()).groups
    blocks = sorted({group.block for group in groups})
    assert len(blocks) == 2
    for block in blocks:
        found = {last(g.producer): set(map(last, g.consumers)) for g in groups if g.block == block}
        assert found == EXPECTED[model_type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_groups_are_found_in_16_bits(dtype: torch.dtype) -> None:
    wide = discover(tiny.build("llama"), tiny.token_ids()).groups
    narrow = discover(tiny.build("llama", dtype), tiny.token_ids()).groups
    assert [(g.producer, sorted(g.consumers)) for g in narrow] == [(g.producer, sorted(g.consumers)) for g in wide]
    for a, b in zip(wide, narrow, strict=True):
        assert all(torch.equal(a.consumers[name], b.consumers[name]) for name in a.consumers)


def test_channel_map_of_grouped_query_attention() -> None:
    """v has 2 heads of 16 channels; heads 0 and 1 of o_proj's input read the first, heads 2 and 3 the second."""
    groups = {last(g.producer): g for g in discover(tiny.build("llama"), tiny.token_ids()).groups[:4]}
    (channel_map,) = groups["v_proj"].consumers.values()
    head = torch.arange(16)
    assert channel_map.tolist() == torch.cat([head, head, head + 16, head + 16]).tolist()


def test_channel_map_of_packed_projections() -> None:
    """Phi-3 packs [q 64, k 32, v 32] and [gate 112, up 112]: only v and up may be scaled."""
    groups = {last(g.producer): g for g in discover(tiny.build("phi3"), tiny.token_ids()).groups[:4]}
    (v_map,) = groups["qkv_proj"].consumers.values()
    assert sorted(set(v_map.tolist())) == list(range(96, 128))
    (up_map,) = groups["gate_up_proj"].consumers.values()
    assert up_map.tolist() == list(range(INTERMEDIATE, 2 * INTERMEDIATE))


def test_more_channels_than_one_pass_can_name() -> None:
    model = tiny.build("llama", hidden_size=320, intermediate_size=5000, head_dim=80)
    groups = {last(g.producer): g for g in discover(model, tiny.token_ids()).groups[:4]}
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
    return {(g.producer, consumer) for g in discover(model, tiny.token_ids()).groups for consumer in g.consumers}


def test_an_architecture_nobody_has_seen() -> None:
    assert found(Model()) == {
        (f"tower.{i}.{a}", f"tower.{i}.{b}") for i in (0, 1) for a, b in (("pre", "widen"), ("widen", "narrow"))
    }


@pytest.mark.parametrize("reader", ["residual", "gate"])
def test_a_norm_that_something_else_reads_is_rejected_with_the_reason(reader: str) -> None:
    discovery = discover(Model(reader), tiny.token_ids())
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
    discover(model, tiny.token_ids())
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
