"""Quantization that is not W8A8: what it is, and who reads it.

True of vLLM 0.33, SGLang 0.5.23 and transformers 5.24, by the methods that each of them registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ...errors import SmoothQuantError
from .base import CONVERT_AGAIN


class Refused(NamedTuple):
    """One value of ``quant_method``.

    Attributes:
        what: what its weights are.
        readers: the programs that read it, empty if it is made while a model in floating point is loaded.
    """

    what: str
    readers: str


REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "gptq": Refused("GPTQ: weights only, in 4 or 8 bits", "vLLM, SGLang and transformers"),
        "awq": Refused("AWQ: weights only, in 4 bits", "vLLM, SGLang and transformers"),
        "auto-round": Refused("AutoRound: weights only, in 2 to 8 bits", "vLLM, SGLang and transformers"),
        "inc": Refused("Intel Neural Compressor: weights only, as AutoRound's", "vLLM"),
        "moe_wna16": Refused("experts as GPTQ's or AWQ's: weights only", "vLLM and SGLang"),
        "bitsandbytes": Refused("bitsandbytes: weights only, or split by outliers", "SGLang and transformers"),
        "eetq": Refused("EETQ: weights only, in 8 bits", "transformers"),
        "hqq": Refused("HQQ: weights only", "transformers"),
        "quanto": Refused("Quanto: weights only", "transformers"),
        "aqlm": Refused("AQLM: weights only, in 2 bits", "transformers"),
        "vptq": Refused("VPTQ: weights only, in 1 to 4 bits", "transformers"),
        "spqr": Refused("SpQR: weights only, in 3 bits", "transformers"),
        "higgs": Refused("HIGGS: weights only, in 2 to 4 bits", "transformers"),
        "sinq": Refused("SINQ: weights only", "transformers"),
        "bitnet": Refused("BitNet: ternary weights", "transformers"),
        "metal": Refused("MLX's affine weights in groups", "transformers, on Apple's GPUs"),
        "gemma": Refused("Gemma's own weights in 2 to 8 bits, with scales for inputs and outputs", "transformers"),
        "gguf": Refused("GGUF: weights only", "llama.cpp and SGLang; name the .gguf file itself and it is dequantized"),
        "mxfp4": Refused("MXFP4: 4-bit weights in blocks of 32", "vLLM, SGLang and transformers"),
        "mxfp8": Refused("MXFP8: scaled in blocks of 32", "vLLM, SGLang and transformers"),
        "nvfp4": Refused("NVFP4: 4-bit weights in blocks of 16", "transformers"),
        "modelopt_fp4": Refused("NVFP4: 4-bit weights in blocks of 16", "vLLM and SGLang"),
        "petit_nvfp4": Refused("NVFP4: 4-bit weights in blocks of 16", "SGLang, on AMD's GPUs"),
        "fouroversix": Refused("Four Over Six: NVFP4 with adaptive scales", "transformers"),
        "fp_quant": Refused("FP-Quant: MXFP4 or NVFP4 with rotations", "vLLM and transformers"),
        "w4afp8": Refused("4-bit weights and FP8 activations", "SGLang"),
        "blockwise_int8": Refused("INT8 scaled in blocks", "SGLang"),
        "torchao": Refused("torchao's own kind of tensors", "vLLM and transformers, both with torchao"),
        "experts_int8": Refused("experts that vLLM quantizes to 8 bits while it loads them", ""),
        "deepspeedfp": Refused("weights that vLLM up to 0.14 quantized to 6 or 8 bits while it loaded them", ""),
        "ptpc_fp8": Refused("weights that older versions of vLLM quantized to FP8 while they loaded them", ""),
    }
)
"""By ``quant_method``, in lower case."""


def refusal(config: Mapping[str, Any], where: str) -> SmoothQuantError:
    """The error for a ``quantization_config`` that no format recognizes.

    Args:
        config: its value.
        where: the name of its file.
    """
    method = config.get("quant_method")
    if method is None:
        what, readers = _without_method(config)
        if not what:
            keys = ", ".join(sorted(map(str, config)))
            return SmoothQuantError(
                f"{where}: quantization_config has no quant_method, only {keys}, so it cannot be told what it is; "
                f"{CONVERT_AGAIN}"
            )
    else:
        what, readers = REFUSED.get(str(method).lower(), ("", ""))
    if what and not readers:
        return SmoothQuantError(
            f"{where}: quant_method {method!r} means {what}, so the weights here are in floating point; remove "
            "quantization_config, and quantize the model with smoothquant-ext"
        )
    description = f"{what}, read by {readers}" if what else repr(method)
    end = "which is not W8A8"
    if str(method).lower() == "torchao":  # one of its many kinds is W8A8
        description, end = f"{what}{_torchao_kind(config)}", f"which are read by {readers}"
    return SmoothQuantError(f"{where}: the model is quantized with {description}, {end}; {CONVERT_AGAIN}")


def _without_method(config: Mapping[str, Any]) -> tuple[str, str]:
    """What a configuration without ``quant_method`` is, by the keys that its writers use."""
    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return REFUSED["bitsandbytes"]
    if {"group_size", "bits"} <= config.keys():
        return "MLX's affine weights in groups", "mlx-lm"
    return "", ""


def _torchao_kind(config: Mapping[str, Any]) -> str:
    """The name of torchao's configuration class, in parentheses, if it is given."""
    kind = config.get("quant_type")
    while isinstance(kind, Mapping):
        kind = kind.get("_type") or kind.get("default")
    return f" ({kind})" if kind else ""
