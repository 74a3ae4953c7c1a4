"""PEFT's LoRA adapters on 8-bit layers: the base does not change, the adapter runs beside it in floating point."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any, NoReturn

import torch

from ..errors import SmoothQuantError
from ..nn.linear import W8A8Linear


def use_adapters() -> bool:
    """Lets PEFT put LoRA adapters on ``W8A8Linear``; returns whether PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        return False
    lora_model: Any = importlib.import_module("peft.tuners.lora.model")
    if not isinstance(lora_model.dispatch_default, _Dispatch):
        lora_model.dispatch_default = _Dispatch(lora_model.dispatch_default)
    return True


def forget_adapters() -> None:
    """Undoes ``use_adapters``."""
    lora_model: Any = sys.modules.get("peft.tuners.lora.model")
    if lora_model is not None and isinstance(lora_model.dispatch_default, _Dispatch):
        lora_model.dispatch_default = lora_model.dispatch_default.former


class _Dispatch:
    """Replaces PEFT's default dispatcher: handles 8-bit layers and passes all others to the former dispatcher."""

    def __init__(self, former: Any) -> None:
        self.former = former
        self.adapted = _adapted_class()

    def __call__(self, target: Any, adapter_name: str, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, W8A8Linear):
            return self.former(target, adapter_name, **kwargs)
        config = kwargs.get("config", kwargs.get("lora_config"))  # the name changed in PEFT 0.19
        if getattr(config, "use_dora", False):
            raise SmoothQuantError("DoRA needs a weight in floating point, and 8-bit layers have none: use LoRA")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            return self.adapted(target, adapter_name, **kwargs)


def _adapted_class() -> Any:
    """Makes the class in a function, because PEFT may not be installed."""
    from peft.tuners.lora.layer import Linear

    class W8A8LoraLinear(Linear):
        """LoRA on an 8-bit layer. It cannot be merged: the sum would have to be quantized again."""

        def _get_base_layer_device_and_dtype(self, base_layer: W8A8Linear) -> tuple[torch.device, None]:
            return base_layer.weight.device, None  # adapters are not cast to 8 bits

        def merge(self, *_args: Any, **_kwargs: Any) -> NoReturn:
            raise SmoothQuantError(
                "an adapter cannot be merged into 8-bit weights; keep it unmerged, or merge it into the original model "
                "and quantize that"
            )

    return W8A8LoraLinear
