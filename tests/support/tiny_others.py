"""Tiny random models that are no causal LM: encoders, encoder-decoders, models that see; and what to give them."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers
from torch import Tensor, nn

from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.scheme import SCHEMES

BERT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 128,
}
T5 = {"vocab_size": tiny.VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 112, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": tiny.VOCAB,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "max_position_embeddings": 128,
}
LLAMA = tiny.SIZES | {name: size for name, size in tiny.LLAMA_LIKE.items() if name != "head_dim"}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VL = {
    "text_config": LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}},
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
        "patch_size": 8,
    },
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
LLAVA = {"text_config": LLAMA | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"}}

# The class of a model -> its configuration, and what it reads besides input_ids, or instead.
IDS = tiny.token_ids()
_PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
_BOTH: dict[str, Any] = {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
_TEXT: dict[str, Any] = {"input_ids": IDS}
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "BertModel": ("BertConfig", BERT, _TEXT),
    "BertForMaskedLM": ("BertConfig", BERT, _TEXT),
    "BertForSequenceClassification": ("BertConfig", BERT, _TEXT),
    "BertLMHeadModel": ("BertConfig", BERT | {"is_decoder": True}, _TEXT | {"use_cache": False}),
    "RobertaForTokenClassification": ("RobertaConfig", BERT | {"pad_token_id": 1}, _TEXT),
    "LlamaModel": ("LlamaConfig", LLAMA, _TEXT | {"use_cache": False}),
    "LlamaForSequenceClassification": ("LlamaConfig", LLAMA, _TEXT | {"use_cache": False}),
    "T5ForConditionalGeneration": ("T5Config", T5, _BOTH),
    "T5EncoderModel": ("T5Config", T5, _TEXT),
    "BartForConditionalGeneration": ("BartConfig", BART, _BOTH),
    "BartForCausalLM": ("BartConfig", BART, _TEXT | {"use_cache": False}),
    "ViTForImageClassification": ("ViTConfig", VISION, {"pixel_values": _PIXELS}),
    "LlavaForConditionalGeneration": ("LlavaConfig", LLAVA, _TEXT | {"use_cache": False}),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VLConfig", QWEN_VL, _TEXT | {"use_cache": False}),
}


def build_other(name: str, dtype: torch.dtype = torch.float32, **overrides: object) -> Any:
    """A randomly initialized model of one of the classes in ``OTHERS``."""
    config, settings, _ = OTHERS[name]
    torch.manual_seed(0)
    # Not model.to(dtype), which would round the rotary frequencies too.
    return (
        getattr(transformers, name)
        ._from_config(getattr(transformers, config)(**settings | overrides), dtype=dtype)
        .eval()
    )


def outputs(model: nn.Module, name: str) -> list[Tensor]:
    """All tensors that a model of the class ``name`` returns."""
    with torch.no_grad():
        returned = model(**OTHERS[name][2])
    return [value for value in returned.to_tuple() if isinstance(value, Tensor)]


def quantize_other_(model: Any, scheme: str = "int8", head: bool = False) -> Any:
    """Quantizes the linear layers of a model without smoothing, with ``head`` the output embedding too."""
    linears = find_linears(model)
    kept = None if head else model.get_output_embeddings()
    names = [name for name, linear in linears.items() if linear is not kept]
    absmax = {name: torch.ones(next(iter(linears[name].parameters())).shape[1]) for name in names}
    convert_(model, names, absmax, SCHEMES[scheme])
    fuse_(model)
    return model
