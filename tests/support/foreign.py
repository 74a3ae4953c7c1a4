"""Writes checkpoints of tiny models as other tools do, and returns their dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smoothquant_ext.scheme import QMAX

Weights: TypeAlias = dict[str, Tensor]
IDS = tiny.token_ids()
# What llm-compressor calls it -> (type, granularity of weights, of activations, dynamic, symmetric activations)
CT_SCHEMES: dict[str, tuple[str, str, str, bool, bool]] = {
    "int8-dynamic": ("int", "channel", "token", True, True),
    "int8-dynamic-asymmetric": ("int", "channel", "token", True, False),
    "int8-static": ("int", "channel", "tensor", False, True),
    "int8-static-asymmetric": ("int", "channel", "tensor", False, False),
    "int8-per-tensor": ("int", "tensor", "tensor", False, True),
    "fp8-dynamic": ("float", "channel", "token", True, True),
    "fp8-static": ("float", "tensor", "tensor", False, True),
}


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that tools quantize: all but the output embedding."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def input_ranges(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """The smallest and largest input value of each linear layer, by name."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _module, args: ranges.update({name: (args[0].min(), args[0].max())})

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears_of(model).items()]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return ranges


def write_compressed_tensors(model: PreTrainedModel, scheme: str, directory: Path, **settings: Any) -> Weights:
    """Quantizes and writes ``model`` with compressed-tensors' own code; the dequantized weights by layer name."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    kind, weight, activation, dynamic, symmetric = CT_SCHEMES[scheme]
    common = {"num_bits": 8, "type": kind}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": weight, "symmetric": True},
        "input_activations": common | {"strategy": activation, "dynamic": dynamic, "symmetric": symmetric},
    }
    config = {"config_groups": {"group_0": group}, "ignore": ["re:.*lm_head"]} | settings
    ranges = input_ranges(model)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    dequantized = {}
    for name, linear in model.named_modules():
        quantization = getattr(linear, "quantization_scheme", None)
        if not isinstance(linear, nn.Linear) or quantization is None:
            continue
        args = quantization.weights
        values = linear.weight.detach()
        per_channel = args.strategy == "channel"
        low, high = values.aminmax(dim=1, keepdim=True) if per_channel else (v.reshape(1) for v in values.aminmax())
        scale, zero = calculate_qparams(low, high, args)
        linear.weight_scale.data.copy_(scale)
        dequantized[name] = fake_quantize(values, linear.weight_scale, zero, args)
        inputs = quantization.input_activations
        if inputs is not None and not inputs.dynamic:
            bounds = (bound.reshape(1) for bound in ranges[name])
            scale, zero = calculate_qparams(*bounds, inputs)
            linear.input_scale.data.copy_(scale)
            linear.input_zero_point.data.copy_(zero)
        linear.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    return dequantized


def write_fp8(
    model: PreTrainedModel,
    directory: Path,
    config: Mapping[str, Any],
    names: tuple[str, str | None],
    per_channel: bool,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Weights:
    """Writes ``model`` in FP8 or INT8 as tools without a format library do; the dequantized weights by layer name.

    ``names`` are those of the weight's scale and of the static activation scale, ``None`` for dynamic activations.
    """
    ranges = input_ranges(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    dequantized = {}
    for name, linear in linears_of(model).items():
        weight = linear.weight.detach()
        absmax = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax()
        scale = absmax / QMAX[dtype]
        steps = weight / scale
        tensors[f"{name}.weight"] = (steps if dtype.is_floating_point else steps.round()).to(dtype)
        tensors[f"{name}.{names[0]}"] = scale
        dequantized[name] = tensors[f"{name}.weight"].float() * scale
        if names[1] is not None:
            low, high = ranges[name]
            tensors[f"{name}.{names[1]}"] = torch.maximum(-low, high) / QMAX[dtype]
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"quantization_config": dict(config)}))
    return dequantized
