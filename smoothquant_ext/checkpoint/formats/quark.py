"""AMD Quark's format, which is read where it is W8A8 and not written.

    {"quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {}, "layer_type_quant_config": {},
     "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel", "symmetric": true, ...},
                             "input_tensors": {"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": false, ...}}}

A layer has ``weight`` [N, K], ``weight_scale`` fp32 [N] or one number, with static activations ``input_scale``, and
zero points, which must be zero. ``exclude`` has wildcards of several kinds, so the files decide which layers are
quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...scheme import scheme_of
from .base import Format, QuantizationMap, TensorNames, all_linears, cache_notes, not_w8a8

DTYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}
READERS = "vLLM, SGLang, and transformers with amd-quark"
GRANULARITIES = {"per_channel": "channel", "per_tensor": "tensor"}


class Quark(Format):
    """AMD Quark's."""

    name = quant_method = "quark"
    tensors = TensorNames(
        input_scale="input_scale", input_zero_point="input_zero_point", weight_zero_point="weight_zero_point"
    )

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        layers = {**(config.get("layer_quant_config") or {}), **(config.get("layer_type_quant_config") or {})}
        whole = config.get("global_quant_config") or {}
        cached = [name for name, layer in layers.items() if layer and layer.get("output_tensors")]
        for name, layer in layers.items():
            if layer and any(layer.get(part) != whole.get(part) for part in ("weight", "input_tensors")):
                raise not_w8a8(f"{where}: {name}", "a scheme of its own in AMD Quark's format", READERS)
        weight, inputs = whole.get("weight"), whole.get("input_tensors")
        other_kind = not_w8a8(f"{where}: it", f"AMD Quark's {_name(weight)} weights, {_name(inputs)} inputs", READERS)
        if not isinstance(weight, Mapping) or not isinstance(inputs, Mapping):
            raise other_kind
        dtype = DTYPES.get(str(weight.get("dtype")))
        if dtype is None or weight.get("is_dynamic") or inputs.get("dtype") != weight.get("dtype"):
            raise other_kind
        granularity = GRANULARITIES.get(str(weight.get("qscheme")))
        dynamic, scheme = inputs.get("is_dynamic", False), str(inputs.get("qscheme"))
        # One dynamic scale for a batch becomes one per token; Quark calls the latter a channel of the transpose.
        known = scheme == "per_tensor" or (dynamic and scheme == "per_channel")
        asymmetric = weight.get("symmetric") is False or inputs.get("symmetric") is False
        if granularity is None or not known or asymmetric:
            content = f"weights {weight.get('qscheme')} and inputs {scheme}{', asymmetric' if asymmetric else ''}"
            raise not_w8a8(f"{where}: it", f"AMD Quark's {content}", READERS)
        activation = "token" if dynamic else "tensor"
        return QuantizationMap(self, all_linears(scheme_of(dtype, granularity, activation)), notes=cache_notes(cached))


def _name(tensor: object) -> str:
    """The dtype of a part of the configuration, as Quark spells it."""
    if isinstance(tensor, Mapping):
        return str(tensor.get("dtype"))
    return "several levels of" if tensor else "floating-point"
