"""The format of msModelSlim, for Ascend's NPUs, which is read and not written.

quant_model_description.json gives the kind of each tensor, among settings of its own:

    {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0", "model.embed_tokens.weight": "FLOAT",
     "model.layers.0.mlp.up_proj.weight": "W8A8_DYNAMIC", "model.layers.0.mlp.up_proj.weight_scale": "W8A8_DYNAMIC"}

A layer of the kind W8A8_DYNAMIC has ``weight`` int8 [N, K], ``weight_scale`` [N, 1], and ``weight_offset`` [N, 1],
which is zero; its activations have a scale per token. A ``quantization_config`` in config.json only names the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SmoothQuantError
from ...scheme import SCHEMES
from .base import CONVERT_AGAIN, Format, QuantizationMap, TensorNames, cache_notes, not_read, not_w8a8

READERS = "vLLM and SGLang on Ascend's NPUs"
W8A8, FLOAT = "W8A8_DYNAMIC", "FLOAT"


class Ascend(Format):
    """msModelSlim's."""

    name = quant_method = "ascend"
    tensors = TensorNames(weight_zero_point="weight_offset")
    config_file = "quant_model_description.json"
    config_file_goes_first = True

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") in ("ascend", "modelslim") or "model_quant_type" in config

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        kinds = {
            name.removesuffix(".weight"): kind
            for name, kind in config.items()
            if name.endswith(".weight") and isinstance(kind, str)
        }
        if not kinds:
            raise SmoothQuantError(
                f"{where}: the configuration names no layer, expected {self.config_file} beside it; download the whole "
                "checkpoint again"
            )
        others = sorted(set(kinds.values()) - {W8A8, FLOAT})
        if others:
            layer = next(name for name, kind in kinds.items() if kind == others[0])
            if others[0] == "W8A8":
                raise not_read(f"{where}: {layer}", "static activations in tensors of msModelSlim's own", READERS)
            raise not_w8a8(f"{where}: {layer}", f"weights of the kind {others[0]}", READERS)
        layers = tuple(name for name, kind in kinds.items() if kind == W8A8)
        if not layers:
            raise SmoothQuantError(f"{where}: no layer is of the kind {W8A8}; {CONVERT_AGAIN}")
        notes = cache_notes(config.get("kv_quant_type") or config.get("kv_cache_type") or config.get("fa_quant_type"))
        return QuantizationMap(self, ((layers, SCHEMES["int8"]),), complete=True, notes=notes)
