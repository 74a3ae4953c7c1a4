"""The FP8 formats of tools without a format library, which are read and not written.

All have ``weight`` float8_e4m3fn [N, K]. The configuration does not say whether a weight's scale is per channel or per
tensor, nor reliably which layers are quantized, so the files decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import scheme_of
from .base import CONVERT_AGAIN, Format, QuantizationMap, TensorNames, all_linears, cache_notes, not_w8a8

E4M3 = torch.float8_e4m3fn


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
        return super().recognizes(config)

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        config = config.get("quantization") or config
        algorithm = str(config.get("quant_algo")).upper()
        if algorithm == "W8A8_SQ_PER_CHANNEL":
            raise SmoothQuantError(
                f"{where}: ModelOpt's INT8 SmoothQuant has tensors of its own, which TensorRT-LLM reads; "
                f"{CONVERT_AGAIN}"
            )
        granularities = {"FP8": ("tensor", "tensor"), "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "token")}
        if algorithm not in granularities:
            content = "blocks, other bits than 8, or no 8-bit weights"
            raise not_w8a8(f"{where}: quant_algo {algorithm!r}", content, "vLLM")
        cache = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
        scheme = scheme_of(E4M3, *granularities[algorithm])
        return QuantizationMap(self, all_linears(scheme), notes=cache_notes(cache))
