"""Tiny random vision-language models, whose names differ between modules and files."""

from __future__ import annotations

import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 48,
        "window_size": 8,
        "fullatt_block_indexes": [0],
    },
}
COMMON = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 1,
    "temporal_patch_size": 1,
    "in_channels": 3,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def build(model_type: str) -> PreTrainedModel:
    """A model of one of the types in ``VISION``: its modules are ``model.visual``, its files say ``visual``."""
    text = {name: size for name, size in tiny.LLAMA_LIKE.items() if name != "head_dim"}
    config = CONFIG_MAPPING[model_type](
        text_config=tiny.SIZES | text | {"rope_parameters": ROPE}, vision_config=COMMON | VISION[model_type]
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return model.eval()
