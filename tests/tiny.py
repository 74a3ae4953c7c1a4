"""Tiny random causal LMs of many architectures, with outliers as harsh as a trained model's."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

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

# model type -> what its configuration needs besides SIZES
CONFIGS: dict[str, dict[str, object]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE,
    "phi3": LLAMA_LIKE,
    "olmo2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
    "opt": GPT_LIKE | {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": GPT_LIKE | {"intermediate_size": 112},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": GPT_LIKE | {"new_decoder_architecture": False, "parallel_attn": True, "multi_query": True},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A randomly initialized model of a transformers ``model_type``."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**(SIZES | CONFIGS[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)  # away from the near-linear regime that an init of std 0.02 lives in
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_ids(rows: int = 2, tokens: int = 24, seed: int = 1) -> Tensor:
    """Random token ids [rows, tokens]."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def amplify_outliers(model: PreTrainedModel, factor: float = 30.0, channels: int = 3) -> None:
    """Makes a few channels of each norm that feeds only linear layers ``factor`` times larger, and undoes it in them.

    The function stays what it was; quantization without smoothing suffers as it does in large trained models. Only for
    Llama-like models, by their names: what smoothing has to find is what this does by hand.
    """
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[:channels] *= factor
                for linear in linears:
                    linear.weight[:, :channels] /= factor
