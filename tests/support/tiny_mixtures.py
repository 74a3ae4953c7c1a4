"""Tiny mixtures of experts of the causal LMs in the installed transformers, from one set of sizes."""

from __future__ import annotations

import inspect
import tempfile
from typing import Any

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# Every family calls the same things by names of its own; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 0),
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LATENT = {"num_key_value_heads": 4, "head_dim": None}  # attention whose heads have sizes of their own

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT,
    "axk2": LATENT,
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "jamba": {},
    "kolibri1": {},
    "laguna": {},
    "llama4_text": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen4_exp_text": {},
    "solar_open": {},
}
"""Families by ``model_type``, and what each needs besides the sizes; ``None`` leaves a size out."""

KEPT_IN_FP32 = (
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "solar_open",
)
"""Families of which transformers loads ``gate.weight`` in fp32."""


def build(family: str, dtype: torch.dtype, **overrides: object) -> PreTrainedModel:
    """A randomly initialized mixture, in the dtypes that ``from_pretrained(dtype=dtype)`` gives its tensors."""
    kind = CONFIG_MAPPING[family]
    known = {*getattr(kind, "__annotations__", {}), *inspect.signature(kind.__init__).parameters}
    wanted = tiny.SIZES | tiny.LLAMA_LIKE | {name: size for name, size in SIZES.items() if name in known}
    settings = {name: size for name, size in (wanted | FAMILIES.get(family, {})).items() if size is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**settings | overrides))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
