"""Hybrid models: one transformer block at many places, between blocks of other kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_blocks import Stack, batches
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from smoothquant_ext import load, quantize, save
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure

ZAMBA = tiny.LLAMA_LIKE | {
    "num_hidden_layers": 6,
    "num_key_value_heads": 4,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "mamba_d_state": 8,
    "n_mamba_heads": 2,
    "use_cache": False,
}
CONFIGS = {
    "zamba": ZAMBA | {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_dt_rank": 8},
    "zamba2": ZAMBA
    | {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {key: value for key, value in CONFIGS[name].items() if key != "head_dim"}
    config = CONFIG_MAPPING[name](**tiny.SIZES, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_blocks_run_in_8_bits_and_come_back(name: str, tmp_path: Path) -> None:
    model, ids = build(name), tiny.token_ids()
    expected = tiny.logits(model, ids)
    quantize(model, [tiny.token_ids(seed=seed) for seed in (2, 3)], progress=False)
    report = model.smoothquant_report
    shared = [layer for layer in report.quantized if ".shared_transf" in layer]
    assert shared
    # Every use of the block reads the same weights: a scale folded for one would change the others.
    assert not any(".shared_transf" in group.producer for group in report.groups)
    norms = {key: reason for key, reason in report.failed.items() if key.endswith("input_layernorm")}
    assert any(".shared_transf" in key and "under another name" in reason for key, reason in norms.items())
    assert tiny.relative_error(model, expected, ids) < 0.05
    save(model, tmp_path)
    assert torch.equal(tiny.logits(load(tmp_path), ids), tiny.logits(model, ids))


def test_one_block_that_runs_many_times_is_smoothed_once() -> None:
    """As in ALBERT: it is one block, whose scales are right in every run."""
    model = Stack(order=(0,) * 5, blocks=1)
    with torch.no_grad():
        expected = model(tiny.token_ids())
        assert len(discover(find_structure(model, tiny.token_ids())).groups) == 2
        quantize(model, batches(4), progress=False)
        error = float((model(tiny.token_ids()) - expected).norm() / expected.norm())
    assert len(model.smoothquant_report.groups) == 2
    assert error < 0.03
