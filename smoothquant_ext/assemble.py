"""Puts ``W8A8Linear`` modules in place while ``from_pretrained`` loads a checkpoint.

transformers builds the model on the meta device, asks its quantizer to swap modules, then reads each tensor from the
files straight into the modules. This quantizer swaps in empty 8-bit layers, so the float weights never exist.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import SmoothQuantError
from .hf import to_model_names
from .linears import Linear, weight_nk
from .modules import W8A8Linear
from .stored import COPY_AGAIN, StoredLayer, read_checkpoint

METHOD = "smoothquant_ext"


@register_quantization_config(METHOD)
class W8A8Config(QuantizationConfigMixin):
    """Tells the quantizer which directory is being loaded; it never reaches a file."""

    def __init__(self, directory: str, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.directory = directory


@register_quantizer(METHOD)
class W8A8Quantizer(HfQuantizer):
    """Checks the checkpoint before the model is built, swaps the layers, and finishes them once they are filled."""

    requires_calibration = True

    def __init__(self, quantization_config: W8A8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.stored = read_checkpoint(Path(quantization_config.directory))

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        optional = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        stored = {
            name: layer
            for name, layer in self.stored.layers.items()
            if not any(re.search(pattern, f"{name}.weight") for pattern in optional)
        }
        for name, path in self._module_paths(model, list(stored)).items():
            linear = self._linear_at(model, path)
            if linear is None:
                raise SmoothQuantError(
                    f"{self.stored.directory}: {name} is quantized, but {type(model).__name__} has no linear layer "
                    "there (experts that transformers fuses are not supported)"
                )
            self._check_fits(name, stored[name], linear)
            model.set_submodule(path, self._empty_layer(stored[name], linear))
        self._check_complete(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        fmt = self.stored.layout.fmt
        for layer in model.modules():
            if isinstance(layer, W8A8Linear):
                shape = (-1, 1) if layer.scheme.weight == "channel" else (1,)
                scale = getattr(layer, fmt.weight_scale)
                _rename_buffer(layer, fmt.weight_scale, "weight_scale", scale.float().reshape(shape))
                if layer.input_scale is not None:
                    layer.input_scale = layer.input_scale.float().reshape(1)
                layer.prepack_()

    def _module_paths(self, model: PreTrainedModel, names: list[str]) -> dict[str, str]:
        renamed = to_model_names(model, [f"{name}.weight" for name in names])
        return {name: renamed[f"{name}.weight"].removesuffix(".weight") for name in names}

    def _linear_at(self, model: nn.Module, path: str) -> Linear | None:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            return None
        return module if isinstance(module, nn.Linear | Conv1D) else None

    def _check_fits(self, name: str, stored: StoredLayer, linear: Linear) -> None:
        shape = [stored.out_features, stored.in_features]
        expected = list(weight_nk(linear).shape)
        if shape != expected:
            raise SmoothQuantError(
                f"{self.stored.directory}: {name}.weight is {shape}, but config.json makes it {expected}; {COPY_AGAIN}"
            )
        if linear.bias is not None and not stored.bias:
            raise SmoothQuantError(
                f"{self.stored.directory}: {name}.bias is missing, but config.json makes the layer have one; "
                f"{COPY_AGAIN}"
            )

    def _check_complete(self, model: PreTrainedModel) -> None:
        """Refuses float weights of layers that the configuration says are quantized."""
        layout = self.stored.layout
        if not layout.complete:
            return
        floats = [
            name.removesuffix(".weight")
            for name, tensor in self.stored.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        ]
        targeted = [name for name in floats if name not in self.stored.layers and layout.scheme_of(name) is not None]
        for name, path in self._module_paths(model, targeted).items():
            if self._linear_at(model, path) is not None:
                raise SmoothQuantError(
                    f"{self.stored.directory}: config.json says {name} is quantized, but its weight is "
                    f"{self.stored.tensors[name + '.weight'].dtype} without a scale; {COPY_AGAIN}"
                )

    def _empty_layer(self, stored: StoredLayer, linear: Linear) -> W8A8Linear:
        """A layer on meta whose buffers have the names and shapes of the file, so that loading fills them."""
        meta = torch.device("meta")
        layer = W8A8Linear(
            stored.in_features,
            stored.out_features,
            stored.bias,
            stored.scheme,
            device=meta,
            dtype=linear.weight.dtype,
        )
        scale = torch.empty(stored.weight_scale_shape, dtype=torch.float32, device=meta)
        _rename_buffer(layer, "weight_scale", self.stored.layout.fmt.weight_scale, scale)
        if stored.input_scale_shape is not None:
            layer.input_scale = torch.empty(stored.input_scale_shape, dtype=torch.float32, device=meta)
        return layer

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _rename_buffer(module: nn.Module, name: str, new_name: str, value: Tensor) -> None:
    """Replaces a buffer by another of a new name, in the same place of the state dict."""
    buffers = [(new_name, value) if key == name else (key, buffer) for key, buffer in module._buffers.items()]
    module._buffers.clear()
    module._buffers.update(buffers)
