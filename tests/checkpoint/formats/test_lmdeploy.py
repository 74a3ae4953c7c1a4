"""Checkpoints in LMDeploy's format, read again by LMDeploy's rules.

The rules are those of lmdeploy/pytorch/nn/linear/w8a8.py and its kernels (0.18): ``quant_dtype`` names an attribute of
torch; a layer has ``weight`` [N, K] of that dtype, ``scale`` fp32 [N, 1] and, where its model has one, ``bias`` [N] in
the model's dtype, here float16; q/k/v and gate/up are concatenated along N. An input row is divided by its absmax /
QMAX and rounded, and a product multiplied by both scales.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_w8a8 import quantized
from torch import Tensor, nn

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.formats.lmdeploy import LMDeploy
from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import SCHEMES

IDS = tiny.token_ids()
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class LMDeployLinear:
    """One of its layers, merged from those of the checkpoint."""

    def __init__(self, tensors: dict[str, Tensor], names: list[str], bias: bool, dtype: torch.dtype) -> None:
        rows = [tensors[f"{name}.weight"].shape[0] for name in names]
        columns = tensors[f"{names[0]}.weight"].shape[1]
        self.weight = torch.empty(sum(rows), columns, dtype=dtype)
        self.scale = torch.empty(sum(rows), 1, dtype=torch.float32)
        self.bias = torch.empty(sum(rows), dtype=torch.float16) if bias else None
        for kind, own in (("weight", self.weight), ("scale", self.scale), ("bias", self.bias)):
            if own is not None:
                for part, name in zip(own.split(rows), names, strict=True):
                    stored = tensors.pop(f"{name}.{kind}")
                    assert stored.dtype == own.dtype or kind == "bias"  # copy_ would convert, and hide it
                    part.copy_(stored)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        qmax = 127 if self.weight.dtype == torch.int8 else torch.finfo(self.weight.dtype).max
        row = x.float().abs().amax(-1, keepdim=True) / qmax
        q = x.float() / row
        q = q.round() if self.weight.dtype == torch.int8 else q.to(self.weight.dtype).float()
        y = (q.double() @ self.weight.double().T) * row * self.scale.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-e5m2"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_by_its_own_rules(model_type: str, scheme: str, tmp_path: Path) -> None:
    saving.save(quantized(model_type, scheme), tmp_path / "model", format="lmdeploy")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "smooth_quant"
    dtype = getattr(torch, config["quant_dtype"])
    assert config["modules_to_not_convert"] == ["lm_head"]
    tensors = load_file(tmp_path / "model" / "model.safetensors")

    model = loading.load(tmp_path / "model")
    seen = inputs_and_outputs(model)
    for block in range(2):
        for parent, leaves in (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj"))):
            for leaf in leaves:
                names = [f"model.layers.{block}.{parent}.{name}" for name in MERGED.get(leaf, (leaf,))]
                bias = model_type == "qwen2" and leaf == "qkv_proj"
                theirs = LMDeployLinear(tensors, names, bias, dtype).forward(seen[names[0]][0])
                ours = torch.cat([seen[name][1] for name in names], -1).double()
                # A row's scale may differ in its last bit, and with it a rounding that was close: one step of one
                # input in hundreds. Biases are rounded to float16.
                assert (ours - theirs).norm() < (2e-3 if dtype == torch.int8 else 2e-2) * theirs.norm()
    assert not any("_proj." in name for name in tensors), "nothing of a linear layer is left over"


def inputs_and_outputs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What every 8-bit layer was given and gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _module, args, output: seen.update({name: (args[0], output)})

    handles = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.endswith("_proj")
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


def test_the_configuration_that_lmdeploy_expects() -> None:
    assert LMDeploy().quantization_config({"a": SCHEMES["fp8-e5m2"]}, ["lm_head"]) == {
        "quant_method": "smooth_quant",
        "quant_dtype": "float8_e5m2",
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.mark.parametrize(("config", "scheme"), [({}, "int8"), ({"quant_dtype": "fp8"}, "fp8")])
def test_configurations_of_its_versions(config: dict[str, Any], scheme: str) -> None:
    quantization = parse_quantization_config({"quant_method": "smooth_quant", **config}, "config.json")
    assert quantization.scheme_of("a") is SCHEMES[scheme]
    assert quantization.fmt.name == "lmdeploy"


def test_another_dtype_is_named() -> None:
    config = {"quant_method": "smooth_quant", "quant_dtype": "int4"}
    with pytest.raises(SmoothQuantError, match=r"^config\.json: quant_dtype 'int4' is not an 8-bit dtype LMDeploy has"):
        parse_quantization_config(config, "config.json")
