"""LMDeploy's smooth_quant: one dtype for all layers, dynamic activations.

    {"quant_method": "smooth_quant", "quant_dtype": "int8", "modules_to_not_convert": ["lm_head"]}

A layer has ``weight`` [N, K] and ``scale`` fp32 [N, 1]. FP8 e5m2 has no other format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme, dtype_name, scheme_of
from .base import CONVERT_AGAIN, Format, QuantizationMap, TensorNames, all_linears, parse_targets


class LMDeploy(Format):
    """LMDeploy's smooth_quant."""

    name = "lmdeploy"
    quant_method = "smooth_quant"
    tensors = TensorNames("scale")
    weight_scale_is_per_channel = True
    dtypes = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    read_by = "LMDeploy"
    how_to_run = (
        "It is stored as LMDeploy stores its own: `lmdeploy serve api_server {name} --backend pytorch`. transformers\n"
        "without smoothquant-ext would load it without its scales, which gives nonsense."
    )

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        name = config.get("quant_dtype", "int8")  # checkpoints older than the key are int8
        name = {"fp8": "float8_e4m3fn"}.get(str(name), name)  # its command line's short name
        dtype = next((dtype for dtype in self.dtypes if dtype_name(dtype) == name), None)
        if dtype is None:
            raise SmoothQuantError(f"{where}: quant_dtype {name!r} is not an 8-bit dtype LMDeploy has; {CONVERT_AGAIN}")
        ignore = parse_targets(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
        return QuantizationMap(self, all_linears(scheme_of(dtype, "channel", "token")), ignore)

    def cannot_store(
        self, schemes: Sequence[Scheme], explicit: bool, rotated: Collection[str] = (), shared: bool = False
    ) -> str:
        if reason := super().cannot_store(schemes, explicit, rotated, shared):
            return reason
        dtypes = sorted({dtype_name(scheme.dtype) for scheme in schemes})
        return f"has one quant_dtype for all layers, and these have {' and '.join(dtypes)}" if len(dtypes) > 1 else ""

    def quantization_config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        dtype = next(iter(schemes.values())).dtype
        return {
            "quant_method": self.quant_method,
            "quant_dtype": dtype_name(dtype),
            "modules_to_not_convert": list(ignore),
        }
