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

SMALL = {
    "vocab_size": tiny.VOCAB,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
WHISPER = SMALL | {
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "begin_suppress_tokens": None,
}
DISTILBERT = {
    "vocab_size": tiny.VOCAB,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 112,
    "max_position_embeddings": 128,
}
MODERNBERT = BERT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CLIP = {
    "text_config": {
        "vocab_size": tiny.VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "vision_config": VISION,
    "projection_dim": 32,
}
SIGLIP = {"text_config": CLIP["text_config"] | {"projection_size": 32}, "vision_config": VISION}
WAV2VEC2 = BERT | {
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
}

# The class of a model -> its configuration, and what it reads besides input_ids, or instead.
IDS = tiny.token_ids()
_PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
_SOUND = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))
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
    "BartForSequenceClassification": ("BartConfig", BART, {"input_ids": torch.cat([IDS, torch.full((2, 1), 2)], 1)}),
    "BartForCausalLM": ("BartConfig", BART, _TEXT | {"use_cache": False}),
    "ViTForImageClassification": ("ViTConfig", VISION, {"pixel_values": _PIXELS}),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT, _TEXT),
    "MPNetModel": ("MPNetConfig", BERT, _TEXT),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", BERT, _TEXT),
    "ModernBertModel": ("ModernBertConfig", MODERNBERT, _TEXT),
    "MarianMTModel": ("MarianConfig", BART | SMALL, _BOTH),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        WHISPER,
        {"input_features": _SOUND, "decoder_input_ids": IDS, "use_cache": False},
    ),
    "Wav2Vec2ForCTC": (
        "Wav2Vec2Config",
        WAV2VEC2,
        {"input_values": torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))},
    ),
    "CLIPModel": ("CLIPConfig", CLIP, {"input_ids": IDS, "pixel_values": _PIXELS}),
    "SiglipModel": ("SiglipConfig", SIGLIP, {"input_ids": IDS, "pixel_values": _PIXELS}),
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
    # nn.MultiheadAttention reads the weight of its last layer, and does not call that.
    read = [each.out_proj for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    names = [name for name, linear in linears.items() if linear is not kept and not any(linear is one for one in read)]
    absmax = {name: torch.ones(next(iter(linears[name].parameters())).shape[1]) for name in names}
    convert_(model, names, absmax, SCHEMES[scheme])
    fuse_(model)
    return model.requires_grad_(False)  # as what is loaded
