"""PEFT's LoRA adapters on 8-bit layers: the base stays as it is, and the adapter is computed beside it, in floats."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any, NoReturn

import torch

from .errors import SmoothQuantError
from .modules import W8A8Linear


def use_adapters() -> bool:
    """Teaches PEFT, where it is installed, to put LoRA adapters on ``W8A8Linear``; whether it is installed."""
    if importlib.util.find_spec("peft") is None:
        return False
    from peft.tuners.lora import model as lora_model

    former = lora_model.dispatch_default
    if getattr(former, "takes_w8a8", False):
        return True
    adapted = _adapted_class()

    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, W8A8Linear):
            return former(target, adapter_name, config=config, **kwargs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")
            return adapted(target, adapter_name, config=config, **kwargs)

    dispatch.takes_w8a8 = True  # type: ignore[attr-defined]
    lora_model.dispatch_default = dispatch
    return True


def _adapted_class() -> Any:
    """A function, since PEFT takes seconds to import and need not be there."""
    from peft.tuners.lora.layer import Linear

    class W8A8LoraLinear(Linear):
        """LoRA on an 8-bit layer. It cannot be merged: the sum would have to be quantized again."""

        def _get_base_layer_device_and_dtype(self, base_layer: W8A8Linear) -> tuple[torch.device, None]:
            return base_layer.weight.device, None  # adapters are not cast to 8 bits

        def merge(self, *_args: Any, **_kwargs: Any) -> NoReturn:
            raise SmoothQuantError(
                "an adapter cannot be merged into 8-bit weights; leave it beside them, or merge it into the original "
                "model and quantize that"
            )

    return W8A8LoraLinear
