"""Tiny random causal LMs of many architectures, with outliers as harsh as a trained model's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCAB = 96
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
GPT_LIKE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Multi-head latent attention: the head sizes of q and k differ from that of v.
DEEPSEEK = {
    **{name: size for name, size in LLAMA_LIKE.items() if name != "head_dim"},
    **MOE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}

# Architecture -> what its configuration needs besides SIZES. It is a transformers model type, or names one.
CONFIGS: dict[str, dict[str, object]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "gemma3_text": LLAMA_LIKE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": LLAMA_LIKE,
    "glm4": LLAMA_LIKE,
    "cohere": LLAMA_LIKE,
    "cohere2": LLAMA_LIKE | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": LLAMA_LIKE
    | {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3, "logits_scaling": 8.0},
    "phi": GPT_LIKE | {"intermediate_size": 112},
    "phi3": LLAMA_LIKE,
    "phi4-mini": LLAMA_LIKE | {"model_type": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "olmo": LLAMA_LIKE,
    "olmo-clipped": LLAMA_LIKE | {"model_type": "olmo", "clip_qkv": 2.0},
    "olmo2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE,
    "opt": GPT_LIKE | {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": GPT_LIKE | {"intermediate_size": 112},
    "gpt_neox-sequential": GPT_LIKE
    | {"model_type": "gpt_neox", "intermediate_size": 112, "use_parallel_residual": False},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "falcon": GPT_LIKE | {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
    "falcon-new": GPT_LIKE | {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-sequential": GPT_LIKE
    | {"model_type": "falcon", "parallel_attn": False, "multi_query": False, "alibi": True, "bias": True},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v2-lite": DEEPSEEK | {"model_type": "deepseek_v2", "q_lora_rank": None, "first_k_dense_replace": 0},
    "deepseek_v3": DEEPSEEK,
    # All experts, since an untrained router wavers, and with it the output leaps.
    "deepseek_v3-moe": DEEPSEEK | {"model_type": "deepseek_v3", "first_k_dense_replace": 0, "num_experts_per_tok": 4},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA_LIKE | MOE | {"num_experts": 4},
    "olmoe": LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": LLAMA_LIKE | {"num_local_experts": 4, "intermediate_size_mlp": 112, "attention_chunk_size": 8},
    "qwen2_moe": LLAMA_LIKE | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 80},
}

LLAMA_NORMS = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}


def build(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A randomly initialized model of one of the architectures in ``CONFIGS``."""
    torch.manual_seed(seed)
    settings = SIZES | {"model_type": architecture} | CONFIGS[architecture] | overrides
    config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)  # away from the near-linear regime that an init of std 0.02 lives in
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def input_columns(reader: nn.Module) -> Tensor:
    """What multiplies each input channel of a layer, or of the experts of a mixture: [K, ...], a view."""
    if isinstance(reader, Conv1D):
        return reader.weight
    return reader.gate_up_proj.permute(2, 0, 1) if hasattr(reader, "gate_up_proj") else reader.weight.T


def token_ids(rows: int = 2, tokens: int = 24, seed: int = 1) -> Tensor:
    """Random token ids [rows, tokens]."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """fp64, whatever the model computes in."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits.double()


def relative_error(model: nn.Module, expected: Tensor, ids: Tensor) -> float:
    """Of the model's logits, in the Euclidean norm over all of them."""
    return float((logits(model, ids) - expected).norm() / expected.norm())


def amplify_outliers(
    model: nn.Module,
    factor: float = 30.0,
    channels: int = 3,
    groups: Mapping[str, Collection[str]] = LLAMA_NORMS,
    norm_offset: float = 0.0,
) -> None:
    """Makes a few channels of each producer ``factor`` times larger, and undoes it in the linear layers that read them.

    The function stays what it was; quantization without smoothing suffers as it does in large trained models. What
    smoothing has to find is what this does by hand.

    Args:
        model: any model whose blocks are numbered.
        factor: by how much.
        channels: how many channels, the first ones.
        groups: for the last part of a producer's name those of its readers' names in the same block. A linear producer
            that is not as wide as its reader's input (packed, or with fewer heads) is left as it is.
        norm_offset: 1 if the norms multiply by ``1 + weight``.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, producer in modules.items():
            numbered = re.match(r"(?:.*?\.)?\d+\.", name)
            readers = groups.get(name.rpartition(".")[2], ())
            if numbered is None or not readers:
                continue
            columns = [
                input_columns(module)
                for reader, module in modules.items()
                if reader.startswith(numbered[0]) and reader.rpartition(".")[2] in readers
            ]
            is_norm = producer.weight.dim() == 1
            rows = producer.weight.T if isinstance(producer, Conv1D) else producer.weight
            if not is_norm and any(rows.shape[0] != column.shape[0] for column in columns):
                continue
            offset = norm_offset if is_norm else 0.0
            rows[:channels] = (rows[:channels] + offset) * factor - offset
            if getattr(producer, "bias", None) is not None:
                producer.bias[:channels] *= factor
            for column in columns:
                column[:channels] /= factor
