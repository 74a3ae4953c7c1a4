"""A tokenizer of whole words, and a Llama of them as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, tiny.VOCAB))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def write_gguf(path: Path) -> Any:
    """A Llama as a GGUF file, with one matrix in Q8_0, and the model it holds."""
    gguf = pytest.importorskip("gguf")
    model = tiny.build("llama")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(112)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tiny.VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([2, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for index in range(2):
        for part, short in parts.items():
            names[f"model.layers.{index}.{part}.weight"] = f"blk.{index}.{short}.weight"
    state = model.state_dict()
    for name, short in names.items():
        value = state[name]
        if ".q_proj" in name or ".k_proj" in name:  # llama.cpp keeps the rotary halves of a head interleaved
            heads = 4 if ".q_proj" in name else 2
            value = value.reshape(heads, 2, 8, 64).transpose(1, 2).reshape(value.shape)
        array = value.numpy().astype(numpy.float32)
        if name == "model.layers.1.mlp.up_proj.weight":
            blocks = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(short, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            dequantized = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
            state[name].copy_(torch.from_numpy(dequantized))
        else:
            writer.add_tensor(short, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
