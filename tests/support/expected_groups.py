"""The smoothing groups that every tiny architecture has."""

from __future__ import annotations

import tiny
from torch import nn

from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure

# For each architecture the producers of each block, by the last part of their name, and what they feed.
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
    # The norms behind attention and MLP go into the residual stream, here and in Gemma, GLM-4 and OLMo-2.
    "gemma2": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "pre_feedforward_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "glm": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_up_proj"},
        "gate_up_proj": {"down_proj"},
    },
    "cohere": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
        "v_proj": {"o_proj"},
        "up_proj": {"down_proj"},
    },
    "olmo": {"v_proj": {"o_proj"}, "up_proj": {"down_proj"}},  # its norms have no weight
    "olmo-clipped": {"up_proj": {"down_proj"}},  # a clamp stands between v and o
    "olmo2": {"v_proj": {"o_proj"}, "up_proj": {"down_proj"}},
    "starcoder2": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"c_fc"},
    },
    "phi": {"input_layernorm": {"q_proj", "k_proj", "v_proj", "fc1"}, "v_proj": {"dense"}},
    "opt": {
        "self_attn_layer_norm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"out_proj"},
        "final_layer_norm": {"fc1"},
        "fc1": {"fc2"},
    },
    "gpt2": {"ln_1": {"c_attn"}, "c_attn": {"c_proj"}, "ln_2": {"c_fc"}},
    "gptj": {"ln_1": {"q_proj", "k_proj", "v_proj", "fc_in"}, "v_proj": {"out_proj"}},
    "bloom": {
        "input_layernorm": {"query_key_value"},
        "query_key_value": {"dense"},
        "post_attention_layernorm": {"dense_h_to_4h"},
    },
    "mpt": {"norm_1": {"Wqkv"}, "Wqkv": {"out_proj"}, "norm_2": {"up_proj"}},
    "falcon": {"input_layernorm": {"query_key_value", "dense_h_to_4h"}, "query_key_value": {"dense"}},
    "falcon-new": {"ln_attn": {"query_key_value"}, "ln_mlp": {"dense_h_to_4h"}, "query_key_value": {"dense"}},
    "deepseek_v3": {
        "input_layernorm": {"q_a_proj", "kv_a_proj_with_mqa"},
        "q_a_layernorm": {"q_b_proj"},
        "kv_a_layernorm": {"kv_b_proj"},
        "kv_b_proj": {"o_proj"},
        "post_attention_layernorm": {"gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    # The gate_proj and up_proj are those of the shared experts, in Qwen2-MoE and Llama 4 too.
    "deepseek_v3-moe": {
        "input_layernorm": {"q_a_proj", "kv_a_proj_with_mqa"},
        "q_a_layernorm": {"q_b_proj"},
        "kv_a_layernorm": {"kv_b_proj"},
        "kv_b_proj": {"o_proj"},
        "post_attention_layernorm": {"gate", "experts", "gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "deepseek_v2-lite": {
        "input_layernorm": {"q_proj", "kv_a_proj_with_mqa"},
        "kv_a_layernorm": {"kv_b_proj"},
        "kv_b_proj": {"o_proj"},
        "post_attention_layernorm": {"gate", "experts", "gate_proj", "up_proj"},
        "up_proj": {"down_proj"},
    },
    "mixtral": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"gate", "experts"},
    },
    "granitemoe": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"router", "experts"},
    },
    "llama4_text": {"input_layernorm": {"q_proj", "k_proj", "v_proj"}, "v_proj": {"o_proj"}, "up_proj": {"down_proj"}},
    "qwen2_moe": {
        "input_layernorm": {"q_proj", "k_proj", "v_proj"},
        "v_proj": {"o_proj"},
        "post_attention_layernorm": {"gate", "experts", "gate_proj", "up_proj", "shared_expert_gate"},
        "up_proj": {"down_proj"},
    },
}


SAME_GROUPS = {
    "llama": ("mistral", "qwen2", "qwen3", "gemma", "stablelm", "granite"),
    "gemma2": ("gemma3_text",),
    "phi3": ("phi4-mini",),
    "glm": ("glm4",),
    "cohere": ("cohere2",),
    "bloom": ("gpt_neox", "gpt_neox-sequential", "falcon-sequential"),
    "deepseek_v3": ("deepseek_v2",),
    "mixtral": ("qwen3_moe", "olmoe"),
}


EXPECTED |= {other: EXPECTED[known] for known, others in SAME_GROUPS.items() for other in others}


# A norm that linear layers read, but not they alone: experts do too, whose tokens were multiplied by scores.
REJECTED = {"llama4_text": {"post_attention_layernorm"}}


def last(name: str) -> str:
    return name.rpartition(".")[2]


def channels_of_values(start: int, stride: int, sharing: int, heads: int = 4, width: int = 16) -> list[int]:
    return [start + head // sharing * stride + channel for head in range(heads) for channel in range(width)]


def map_behind_attention(model: nn.Module) -> list[int]:
    groups = discover(find_structure(model, tiny.token_ids())).groups
    (channel_map,) = next(group for group in groups if group.kind == "linear").consumers.values()
    return channel_map.tolist()
