"""Writes llmcompressor/ and llmcompressor_experts/: tiny checkpoints made by llm-compressor, the latter of mixtures of
experts, and what it computes with them.

    .venv-llmc/bin/python tests/data/write_llmcompressor.py

llm-compressor pins other versions than ours of what we stand on, so its checkpoints are kept here, as it wrote them.
The models are random, a block each; `expected.safetensors` holds token ids, and the logits of the model that
compressed-tensors decompresses, with the activations rounded by compressed-tensors.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

HERE = Path(__file__).parent
SIZES = {"vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OPT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
MODELS = {
    "llama": LLAMA | {"tie_word_embeddings": False},
    "qwen2": LLAMA | {"tie_word_embeddings": True},
    "opt": OPT,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = {
    "mixtral": LLAMA | {"num_local_experts": 4},
    "granitemoe": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": LLAMA | MOE | {"shared_expert_intermediate_size": 40},
}
IGNORE = ["lm_head"]
ROUTERS = ["re:.*\\.gate$", "re:.*router.*", "re:.*shared_expert_gate$"]


def scheme(kind: str, weight: str, activation: str, symmetric: bool = True) -> QuantizationScheme:
    """One scheme for all linear layers."""
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, type=kind, strategy=weight),
        input_activations=QuantizationArgs(
            num_bits=8, type=kind, strategy=activation, dynamic=activation == "token", symmetric=symmetric
        ),
    )


RECIPES = {
    "int8-dynamic": {"targets": "Linear", "scheme": "W8A8"},
    "int8-dynamic-asymmetric": {"config_groups": {"group_0": scheme("int", "channel", "token", symmetric=False)}},
    "int8-static": {"config_groups": {"group_0": scheme("int", "channel", "tensor")}},
    "int8-static-asymmetric": {"config_groups": {"group_0": scheme("int", "channel", "tensor", symmetric=False)}},
    "fp8-dynamic": {"targets": "Linear", "scheme": "FP8_DYNAMIC"},
    "fp8-static": {"targets": "Linear", "scheme": "FP8"},
}


MIXTURE_RECIPES = ("int8-dynamic", "int8-static", "fp8-dynamic")


def main() -> None:
    """Writes everything anew."""
    for folder, models, recipes, ignore in (
        ("llmcompressor", MODELS, tuple(RECIPES), IGNORE),
        ("llmcompressor_experts", MIXTURES, MIXTURE_RECIPES, IGNORE + ROUTERS),
    ):
        shutil.rmtree(HERE / folder, ignore_errors=True)
        for kind, settings in models.items():
            for name in recipes:
                write(HERE / folder / f"{kind}-{name}", kind, settings, RECIPES[name], ignore)
                print(f"{kind}-{name}")


def write(target: Path, kind: str, settings: dict[str, object], recipe: dict[str, object], ignore: list[str]) -> None:
    """Writes one checkpoint."""
    windows = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **settings)).eval().bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as original:  # llm-compressor asks what a model was loaded from
        model.save_pretrained(original)
        model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).eval()
        modifier = QuantizationModifier(ignore=ignore, **recipe)
        oneshot(model=model, processor=False, dataset=DataLoader(samples), recipe=[modifier])
        with torch.no_grad():
            logits = model.float()(windows[:2]).logits
        model.bfloat16().save_pretrained(target, save_compressed=True)
        (target / "generation_config.json").unlink(missing_ok=True)
        save_file({"windows": windows[:2].clone(), "logits": logits.contiguous()}, target / "expected.safetensors")


if __name__ == "__main__":
    main()
