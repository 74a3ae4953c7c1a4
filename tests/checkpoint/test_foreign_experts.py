"""Checkpoints of mixtures that llm-compressor wrote, or that are written as it does."""

from __future__ import annotations

import json
from pathlib import Path

import foreign
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from smoothquant_ext import load, save
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.nn.experts import W8A8Experts, in_floating_point
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.scheme import QMAX

IDS = tiny.token_ids(seed=9)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def experts_of(model: nn.Module) -> list[W8A8Experts]:
    return [module for module in model.modules() if isinstance(module, W8A8Experts)]


def write_as_llmcompressor(
    name: str, directory: Path, kind: str, strategy: str, is_static: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """A checkpoint as llm-compressor writes it, with compressed-tensors' own arithmetic; its 8-bit layers."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize as round_
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny.build(name)
    model.save_pretrained(directory)
    tensors, layers = load_file(directory / "model.safetensors"), {}
    linears = [f"{layer}.weight" for layer in foreign.linears_of(model) if not layer.endswith("gate")]
    arguments = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True)
    for key in [key for key in tensors if ".experts." in key or key in linears]:
        weight = tensors[key].float()
        low, high = weight.aminmax(dim=1, keepdim=True) if strategy == "channel" else (
            bound.reshape(1) for bound in weight.aminmax()
        )  # fmt: skip
        scale, zero = calculate_qparams(low, high, arguments)
        dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
        tensors[key] = round_(weight, scale, zero, arguments, dtype=dtype)
        tensors[f"{key}_scale"] = scale
        if is_static:
            tensors[f"{key.removesuffix('weight')}input_scale"] = torch.tensor([0.05])
        layers[key.removesuffix(".weight")] = tensors[key], scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False},
        "input_activations": {
            "num_bits": 8,
            "type": kind,
            "strategy": "tensor" if is_static else "token",
            "symmetric": True,
            "dynamic": not is_static,
        },
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int" else "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*gate$", "re:.*shared_expert_gate$"],
        "config_groups": {"group_0": group},
    }
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))
    return layers


@pytest.mark.parametrize(("kind", "strategy"), [("int", "channel"), ("int", "tensor"), ("float", "channel")])
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "deepseek_v3-moe"])
def test_checkpoints_of_llmcompressor(model: str, kind: str, strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    stored = write_as_llmcompressor(model, tmp_path / "model", kind, strategy, is_static=False)
    loaded = load(tmp_path / "model")
    paths = {path.replace(".mlp.", ".block_sparse_moe.") if model == "mixtral" else path: layer
             for path, layer in quantized_layers(loaded).items()}  # fmt: skip
    assert paths.keys() == stored.keys()
    exact = tiny.build(model)
    state = {}
    for path, (weight, scale) in stored.items():
        assert torch.equal(paths[path].plain_weight().float(), weight.float()), path
        assert torch.equal(paths[path]._plain_scale().reshape(-1)[:1], scale.reshape(-1)[:1]), path
        state[path] = weight.float() * scale.float()
    # The rest of the error is that of the rounded inputs, which is half of that in test_quantize.
    exact.save_pretrained(tmp_path / "exact")
    tensors = load_file(tmp_path / "exact" / "model.safetensors")
    save_file(
        tensors | {f"{path}.weight": weight for path, weight in state.items()},
        tmp_path / "exact" / "model.safetensors",
        metadata={"format": "pt"},
    )
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exact"))
    error = float((logits(loaded) - expected).norm() / expected.norm())
    assert 0 < error < (0.1 if QMAX[paths[next(iter(paths))].scheme.dtype] == 127 else 0.2)


class Exact(nn.Module):
    """Experts with the dequantized weights of 8-bit ones, and inputs as they come."""

    def __init__(self, experts: W8A8Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return in_floating_point(self.experts, x, index, weights)


def exact_(model: nn.Module) -> None:
    """Replaces all that is quantized by floating point."""
    for path, module in list(model.named_modules()):
        if isinstance(module, W8A8Experts):
            model.set_submodule(path, Exact(module))
        elif isinstance(module, W8A8Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.plain_weight().float() * module._plain_scale()
            if module.bias is not None:
                linear.bias.data = module.bias
            model.set_submodule(path, linear)


WRITTEN = Path(__file__).parent / "data" / "llmcompressor_experts"


@pytest.mark.parametrize("written", sorted(path.name for path in WRITTEN.iterdir()))
@pytest.mark.filterwarnings("ignore:.*inputs of experts get a scale per token")
def test_llmcompressor(written: str, tmp_path: Path) -> None:
    """What llm-compressor itself wrote, see data/write_llmcompressor.py: its weights, and logits as near as its own."""
    model = load(WRITTEN / written, dtype=torch.float32)
    stored = load_file(WRITTEN / written / "model.safetensors")
    expected = load_file(WRITTEN / written / "expected.safetensors")
    # Of Mixtral it writes other names than its float checkpoints have, and vLLM reads both.
    mixtral = {".mlp.": ".block_sparse_moe.", ".w1": ".gate_proj", ".w2": ".down_proj", ".w3": ".up_proj"}
    assert len(quantized_layers(model)) == sum(name.endswith("weight_scale") for name in stored)
    for path, layer in quantized_layers(model).items():
        name = path
        for ours, theirs in mixtral.items() if "mixtral" in written else ():
            name = name.replace(ours, theirs)
        assert torch.equal(layer.plain_weight().float(), stored[f"{name}.weight"].float()), name
        assert torch.equal(layer._plain_scale(), stored[f"{name}.weight_scale"].float()), name
    with torch.no_grad():
        actual = model(expected["windows"]).logits
        save(model, tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(expected["windows"]).logits, actual)
        exact_(model)
        unrounded = model(expected["windows"]).logits
    ours, theirs = ((x - unrounded).norm(dim=-1).flatten().median() for x in (actual, expected["logits"]))
    # Twice rounded at random, theirs also in bf16; the median, because an expert chosen otherwise is a leap.
    assert 0 < ours < 1.25 * theirs
    assert ours < 0.1 * unrounded.norm(dim=-1).median()


def test_static_inputs_of_experts_become_dynamic(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    write_as_llmcompressor("qwen2_moe", tmp_path / "static", "int", "channel", is_static=True)
    write_as_llmcompressor("qwen2_moe", tmp_path / "dynamic", "int", "channel", is_static=False)
    with pytest.warns(UserWarning, match="inputs of experts get a scale per token"):
        static = load(tmp_path / "static")
    dynamic = load(tmp_path / "dynamic")
    for one, other in zip(experts_of(static), experts_of(dynamic), strict=True):
        assert not one.scheme.is_static
        assert torch.equal(one.gate, other.gate)
    assert any(layer.input_scale is not None for layer in quantized_layers(static).values())
