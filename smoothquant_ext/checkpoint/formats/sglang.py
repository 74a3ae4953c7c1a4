"""The formats of SGLang, which have one scheme each and are read and not written.

    {"quant_method": "w8a8_int8", "ignore": ["lm_head"]}

A layer has ``weight`` [N, K] and ``weight_scale`` fp32 [N, 1]; activations have a scale per token. SGLang takes the
names of ``ignore`` as vLLM does for compressed-tensors; ``w8a8_fp8`` has no such list, so the files decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...scheme import SCHEMES
from .base import Format, QuantizationMap, all_linears, parse_targets


class SGLang(Format):
    """One of SGLang's formats.

    Args:
        quant_method: its ``quant_method``.
        dtype: the 8-bit dtype of its weights.
    """

    weight_scale_is_per_channel = True

    def __init__(self, quant_method: str, dtype: torch.dtype) -> None:
        self.name = self.quant_method = quant_method
        self.scheme = next(
            scheme
            for scheme in SCHEMES.values()
            if (scheme.dtype, scheme.weight, scheme.activation) == (dtype, "channel", "token")
        )

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        ignore = parse_targets(config.get("ignore"), f"{where}: ignore")
        return QuantizationMap(self, all_linears(self.scheme), ignore)
