"""The FP8 formats of tools without a format library, which are read and not written.

All have ``weight`` float8_e4m3fn [N, K]. The configuration does not say whether a weight's scale is per channel or per
tensor, nor reliably which layers are quantized, so the files decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme, scheme_of
from .base import FloatWeights, Format, QuantizationMap, TensorNames, all_linears, cache_notes, not_read, not_w8a8

E4M3 = torch.float8_e4m3fn


# ModelOpt's other algorithms: what they have, and who reads it.
MODELOPT_REFUSED = {
    "W8A16": ("INT8 weights and floating-point activations", "TensorRT-LLM"),
    "MXFP8": ("FP8 weights scaled in blocks of 32", "vLLM and SGLang"),
    "FP8_PB_WO": ("FP8 weights scaled in blocks, and floating-point activations", "vLLM and TensorRT-LLM"),
    "NVFP4": ("4-bit weights in blocks of 16", "vLLM, SGLang and TensorRT-LLM"),
}


class Fp8(Format):
    """``fp8`` as vLLM (AutoFP8) spells it."""

    name = quant_method = "fp8"
    tensors = TensorNames(input_scale="input_scale")

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        if block := config.get("weight_block_size"):
            raise not_w8a8(f"{where}: it", f"FP8 weights scaled in blocks of {block}", "vLLM, SGLang and transformers")
        activation = config.get("activation_scheme", "dynamic")
        if activation not in ("static", "dynamic"):
            raise SmoothQuantError(f"{where}: activation_scheme is {activation!r}, expected static or dynamic")
        scheme = scheme_of(E4M3, "tensor", "tensor" if activation == "static" else "token")
        return QuantizationMap(self, all_linears(scheme), notes=cache_notes(config.get("kv_cache_scheme")))

    def variant(self, tensors: Collection[str]) -> Format:
        suffix = f".{TransformersFp8.tensors.weight_scale}"
        return TransformersFp8() if any(name.endswith(suffix) for name in tensors) else self


class TransformersFp8(Fp8):
    """``fp8`` as transformers spells it: the same configuration, other names of tensors."""

    tensors = TensorNames("weight_scale_inv", "activation_scale")


class FbgemmFp8(Format):
    """FBGEMM's, in which Meta published Llama."""

    name = quant_method = "fbgemm_fp8"

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        # Its activation_scale_ub cuts off a token's largest values. A scale per token that is not cut is more exact.
        return QuantizationMap(self, all_linears(scheme_of(E4M3, "channel", "token")))


class ModelOpt(Format):
    """NVIDIA ModelOpt's, in config.json or in a file beside it."""

    name = quant_method = "modelopt"
    tensors = TensorNames(input_scale="input_scale")
    config_file = "hf_quant_config.json"

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        if config.get("quant_method") is None:
            return "quant_algo" in config or "quantization" in config
        return config["quant_method"] in ("modelopt", "modelopt_fp8", "modelopt_mixed")

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        config = config.get("quantization") or config
        notes = cache_notes(config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme"))
        if config.get("quant_algo") is None and notes:
            raise FloatWeights(f"{where}: no weights are quantized, and {notes[0]}")
        algorithm = str(config.get("quant_algo")).upper()
        layers = config.get("quantized_layers")
        if algorithm != "MIXED_PRECISION" or not layers:
            scheme = _scheme_of_algorithm(algorithm, f"{where}: quant_algo {algorithm!r}")
            return QuantizationMap(self, all_linears(scheme), notes=notes)
        schemes: dict[Scheme, list[str]] = {}
        for name, layer in layers.items():
            algorithm = str(layer.get("quant_algo")).upper()
            scheme = _scheme_of_algorithm(algorithm, f"{where}: {name} with quant_algo {algorithm!r}")
            schemes.setdefault(scheme, []).append(name)
        return QuantizationMap(self, tuple((tuple(names), scheme) for scheme, names in schemes.items()), notes=notes)


def _scheme_of_algorithm(algorithm: str, subject: str) -> Scheme:
    """The scheme of one of ModelOpt's algorithms; ``subject`` has it."""
    granularities = {"FP8": ("tensor", "tensor"), "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "token")}
    if algorithm in granularities:
        return scheme_of(E4M3, *granularities[algorithm])
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        raise not_read(subject, "INT8 weights and activations in tensors of ModelOpt's own", "TensorRT-LLM")
    content, readers = MODELOPT_REFUSED.get(algorithm, ("blocks, other bits than 8, or no 8-bit weights", "vLLM"))
    raise not_w8a8(subject, content, readers)
