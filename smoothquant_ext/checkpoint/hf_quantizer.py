"""Puts ``W8A8Linear`` modules in place while ``from_pretrained`` loads a checkpoint.

transformers builds the model on the meta device, asks its quantizer to swap modules, then reads each tensor from the
files straight into the modules. This quantizer swaps in empty 8-bit layers, so the float weights never exist. Once they
are filled it packs and fuses them, and is removed from the model, which can then be cast, moved and saved like any.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import SmoothQuantError
from ..fusion.fuse import fuse_
from ..nn.embedding import W8A8Embedding
from ..nn.experts import W8A8Experts
from ..nn.finalize import finalize_, forget_ties_
from ..nn.linear import W8A8Linear
from ..probing.linears import Linear, weight_nk
from ..traits import embedding_of
from .completeness import check_loaded
from .formats.base import not_read
from .hf_names import expert_key, renamed_alone, to_model_names
from .loading_experts import CheckpointExperts, find_experts, finish_experts_, swap_experts_
from .naming import names_of_layers, set_quantization_config_
from .reading import (
    COPY_AGAIN,
    EIGHT_BIT,
    Checkpoint,
    CheckpointLayer,
    find_layers,
    names_of_8_bit_weights,
    open_checkpoint,
    read_tensors,
)
from .rotations import check_rotations
from .scales import check_scales, describe, is_zero_point, unused_scales

METHOD = "smoothquant_ext"
UNTIE = "set tie_word_embeddings to false there"


@register_quantization_config(METHOD)
class W8A8Config(QuantizationConfigMixin):
    """The arguments of the quantizer; it is never written to a file.

    Attributes:
        directory: the directory of the checkpoint; ``None`` if transformers finds the files.
        infer_dtype: whether neither the caller nor the configuration names a dtype for what is not quantized.
        ready: whether to pack and fuse the loaded layers where they are.
        as_w8a8: whether to quantize the activations of a checkpoint that has 8-bit weights alone.
    """

    def __init__(
        self,
        directory: str | None = None,
        infer_dtype: bool = False,
        ready: bool = True,
        as_w8a8: bool = False,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.directory = directory
        self.infer_dtype = infer_dtype
        self.ready = ready
        self.as_w8a8 = as_w8a8


@register_quantizer(METHOD)
class W8A8Quantizer(HfQuantizer):
    """Checks the checkpoint before the model is built, swaps the layers, and finishes them once they are filled."""

    requires_calibration = True

    def __init__(self, quantization_config: W8A8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.checkpoint: Checkpoint
        self.experts = CheckpointExperts()
        self.info: dict[str, set[Any]] = {}  # what transformers finds missing and unexpected
        self.unused: frozenset[str] = frozenset()  # names of scales in the files
        self.optional: Any = None  # the class's own list of tensors that it does without
        if quantization_config.directory is not None:
            self.checkpoint = open_checkpoint(Path(quantization_config.directory), quantization_config.as_w8a8)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # Left alone, transformers would take the dtype of the first tensor, which may be an FP8 weight or a scale.
        if self.quantization_config.infer_dtype:
            return self.checkpoint.float_dtype
        return dtype if dtype.itemsize > 1 else torch.bfloat16

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.quantization_config.directory is None:
            if not checkpoint_files:
                raise SmoothQuantError("a quantized model is loaded from files, not from a state dict")
            self.checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent)
        directory = self.checkpoint.directory
        for note in self.checkpoint.quantization.notes:
            warnings.warn(f"{directory}: {note}", stacklevel=2)
        self.optional = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        stored = names_of_8_bit_weights(self.checkpoint.tensors)
        self.experts = find_experts(model, self.checkpoint, stored)
        self.checkpoint = self._without_unknown_layers(model)
        eight_bit = names_of_8_bit_weights(self.checkpoint.tensors)
        if eight_bit or not stored:  # else all its names are wrong, as completeness says better
            self.checkpoint = find_layers(self.checkpoint, self.experts.paths, names_of_layers(model, eight_bit))
        check_scales(self.checkpoint)
        layers = self.checkpoint.layers
        embedding = self._embedding_of_head(model)
        self._check_shapes(model)
        self._check_complete(model)
        check_rotations(model, self.checkpoint, stored)
        for name, path, linear in list(self._linears(model, layers)):
            if name in self.experts.paths:
                continue
            if linear is None and isinstance(dict(model.named_modules()).get(path), nn.Embedding):
                raise not_read(f"{directory}: {name}", "the 8-bit weights of an embedding", "transformers")
            if linear is None:
                raise SmoothQuantError(
                    f"{directory}: {name} is quantized, but {type(model).__name__} has no linear layer there"
                )
            if linear.bias is not None and not layers[name].bias:
                raise SmoothQuantError(
                    f"{directory}: {name}.bias is missing, but config.json makes the layer have one; {COPY_AGAIN}"
                )
            model.set_submodule(path, self._empty_layer(layers[name], linear.weight.dtype))
        swap_experts_(model, self.checkpoint, self.experts, self._empty_layer)
        if embedding:
            factor = torch.empty(1, dtype=model.get_submodule(embedding).weight.dtype, device="meta")
            model.set_submodule(embedding, W8A8Embedding(embedding_of(model, "output"), factor))
        forget_ties_(model)
        self._leave_out_scales(model)
        if self.quantization_config.directory is None:  # else the caller asks for it, and knows what may be dropped
            self._listen_(model)

    def _embedding_of_head(self, model: PreTrainedModel) -> str:
        """The path of the token embedding that reads the weight of the output embedding, which has 8 bits, or ''."""
        head, modules = embedding_of(model, "output"), dict(model.named_modules())
        linears = self._linears(model, self.checkpoint.layers)
        quantized = [name for name, _, linear in linears if linear is not None and linear is head]
        if not quantized:
            return ""
        stored = {place: name for name, place in to_model_names(model, self.checkpoint.tensors).items()}
        shares = self.checkpoint.quantization.fmt.shares_head
        embedding = next((path for path in modules if shares and f"{path}.factor" in stored), "")
        if embedding and modules[embedding] is embedding_of(model, "input"):
            self._check_factor(stored[f"{embedding}.factor"])
            return embedding
        if getattr(model.config, "tie_word_embeddings", False):
            raise SmoothQuantError(
                f"{self.checkpoint.directory}: {quantized[0]} is quantized, but config.json ties it to the token "
                + (f"embedding, whose factor is missing; {COPY_AGAIN}" if shares else f"embedding; {UNTIE}")
            )
        return ""

    def _check_factor(self, name: str) -> None:
        """Refuses what is no number that embeddings can be multiplied by."""
        tensor = self.checkpoint.tensors[name]
        values = [value for _, value in read_tensors(self.checkpoint.tensors, [name])] if tensor.shape == (1,) else []
        if not all(value.isfinite() and value != 0 for value in values) or not values:
            raise SmoothQuantError(
                f"{tensor.file}: {name} is {tensor}{f' {values[0].tolist()}' if values else ''}, expected one finite "
                f"number other than 0; {COPY_AGAIN}"
            )

    def _listen_(self, model: PreTrainedModel) -> None:
        """Keeps what transformers finds missing or unexpected, which it tells its caller but not a quantizer."""
        adjust = getattr(model, "_adjust_missing_and_unexpected_keys", None)

        def listen(info: Any, *arguments: Any) -> Any:
            result = adjust(info, *arguments) if adjust is not None else None
            self.info = {name: getattr(info, name, set()) for name in ("missing_keys", "unexpected_keys")}
            return result

        vars(model)["_adjust_missing_and_unexpected_keys"] = listen

    def _without_unknown_layers(self, model: PreTrainedModel) -> Checkpoint:
        """The checkpoint without the 8-bit layers that the model has no module for.

        Their tensors are refused, or left out, like all others without a place: see ``completeness``.
        """
        tensors = self.checkpoint.tensors
        unknown = set(unknown_layers(model, names_of_8_bit_weights(tensors))) - self.experts.paths.keys()
        return replace(
            self.checkpoint,
            tensors={name: tensors[name] for name in tensors if name.rpartition(".")[0] not in unknown},
        )

    def _leave_out_scales(self, model: PreTrainedModel) -> None:
        """Says which scales nothing uses, and keeps transformers from taking them for tensors that lack a place."""
        checkpoint, layers = self.checkpoint, self.checkpoint.layers
        unused = unused_scales(checkpoint)
        of_experts = {name for name in unused if name.rpartition(".")[0] in self.experts.paths}
        places = to_model_names(model, unused.keys() - of_experts)
        expected = model.state_dict()
        unused = {name: suffix for name, suffix in unused.items() if places.get(name) not in expected}
        lacking = {f"{name.rpartition('.')[0]}.weight": name for name in unused if name not in of_experts}
        for weight, path in to_model_names(model, lacking.keys() - checkpoint.tensors.keys()).items():
            scale = lacking[weight]
            if path in expected and unused[scale] == checkpoint.quantization.fmt.tensors.weight_scale:
                file = checkpoint.tensors[scale].file
                raise SmoothQuantError(f"{file}: {scale} is stored but {weight} is missing; {COPY_AGAIN}")
        # Zero points of layers are zero; that experts' inputs have scales of their own was said.
        said = {name for name in unused if name.rpartition(".")[0] in layers and is_zero_point(name)} | of_experts
        if told := {name: suffix for name, suffix in unused.items() if name not in said}:
            warnings.warn(
                f"{checkpoint.directory}: {len(told)} scales that no layer here uses are left out: {describe(told)}",
                stacklevel=2,
            )
        self.unused = frozenset(unused)
        matrices = {transform.matrix for transform in checkpoint.quantization.transforms}  # which were checked
        if ends := {*unused.values(), *matrices}:
            suffixes = "|".join(sorted(map(re.escape, ends)))
            model._keys_to_ignore_on_load_unexpected = {*(self.optional or ()), rf"\.({suffixes})$"}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to read a tensor in, ``None`` for that of the file, which 8-bit weights keep.

        transformers reads in fp32 what its patterns match, such as ``gate.weight`` for a router: 8-bit weights may be
        called so too.
        """
        stored = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        if stored in EIGHT_BIT or stored in EIGHT_BIT.values():
            return None
        kept: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return kept

    def get_weight_conversions(self) -> list[Any]:
        """The renamings that transformers applies besides those of the model."""
        conversions: list[Any] = super().get_weight_conversions()
        return [*conversions, self.experts.renaming()] if self.experts.readings else conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        vars(model).pop("_adjust_missing_and_unexpected_keys", None)
        if self.info:
            check_loaded(str(self.checkpoint.directory), model, self.info)
        for layer in model.modules():
            if isinstance(layer, W8A8Linear):
                self._normalize_(layer)
        finish_experts_(model)
        model._keys_to_ignore_on_load_unexpected = self.optional
        self.remove_quantization_config(model)
        finalize_(model, refused=set_quantization_config_(model))
        if self.quantization_config.ready:
            make_ready_(model)

    def _normalize_(self, layer: W8A8Linear) -> None:
        """Gives the buffers of a filled layer the names, shapes and dtype that ``W8A8Linear`` documents."""
        # Versions of transformers that do not ask ``get_new_dtype`` may have read it in fp32, which is exact both ways.
        layer.weight = layer.weight.to(layer.scheme.dtype)
        shapes = {
            "weight_scale": (-1, 1) if layer.scheme.weight == "channel" else (1,),
            "input_scale": (1,),
            "input_zero_point": (1,),
            "smooth": (-1,),
        }
        for buffer, shape in shapes.items():
            name = getattr(self.checkpoint.quantization.fmt.tensors, buffer)
            if name is not None and (value := layer._buffers.get(name)) is not None:
                _rename_buffer(layer, name, buffer, value.float().reshape(shape))

    def _linears(self, model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, str, Linear | None]]:
        """The name in the checkpoint, the path in the model, and the linear layer at that path, if any."""
        modules = dict(model.named_modules())
        for key, renamed in to_model_names(model, [f"{name}.weight" for name in names]).items():
            path = (renamed or "").removesuffix(".weight")
            module = modules.get(path)
            yield key.removesuffix(".weight"), path, module if isinstance(module, nn.Linear | Conv1D) else None

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """Refuses tensors that do not fit the model, which older versions of transformers would load nevertheless."""
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        for _, path, linear in self._linears(model, self.checkpoint.layers):
            if linear is not None:
                expected[f"{path}.weight"] = weight_nk(linear).shape  # Conv1D holds the transpose of what is stored
        for name, renamed in to_model_names(model, self.checkpoint.tensors).items():
            shape = list(self.checkpoint.tensors[name].shape)
            if renamed in expected and shape != list(expected[renamed]):
                raise SmoothQuantError(
                    f"{self.checkpoint.directory}: {name} is {shape}, but config.json makes it "
                    f"{list(expected[renamed])}; {COPY_AGAIN}"
                )

    def _check_complete(self, model: PreTrainedModel) -> None:
        """Refuses float weights of layers that the configuration says are quantized."""
        quantization = self.checkpoint.quantization
        if not quantization.complete:
            return
        floats = {
            name.removesuffix(".weight")
            for name, tensor in self.checkpoint.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        }
        names = names_of_layers(model, floats - self.checkpoint.layers.keys())
        targeted = [name for name, all_names in names.items() if quantization.expects(*all_names)]
        experts = find_experts(model, self.checkpoint, targeted).paths
        for name, _, linear in self._linears(model, targeted):
            if linear is not None or name in experts:
                scale = f"{name}.{quantization.fmt.tensors.weight_scale}"
                raise SmoothQuantError(
                    f"{self.checkpoint.directory}: config.json says {name} is quantized, but its weight is "
                    f"{self.checkpoint.tensors[name + '.weight'].dtype} "
                    f"{'beside' if scale in self.checkpoint.tensors else 'without'} a scale; {COPY_AGAIN}"
                )

    def _empty_layer(self, described: CheckpointLayer, dtype: torch.dtype) -> W8A8Linear:
        """A layer on meta whose buffers have the names and shapes of the file, so that loading fills them."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device="meta")

        k, n = described.in_features, described.out_features
        layer = W8A8Linear(k, n, described.bias, described.scheme, device="meta", dtype=dtype)
        layer.rotate = described.rotate
        names = self.checkpoint.quantization.fmt.tensors
        _rename_buffer(layer, "weight_scale", names.weight_scale, empty(*described.weight_scale_shape))
        if described.input_scale_shape is not None:
            assert names.input_scale is not None
            _rename_buffer(layer, "input_scale", names.input_scale, empty(*described.input_scale_shape))
        if described.zero_point_shape is not None:
            assert names.input_zero_point is not None
            _rename_buffer(layer, "input_zero_point", names.input_zero_point, empty(*described.zero_point_shape))
        if described.smooth:
            assert names.smooth is not None
            _rename_buffer(layer, "smooth", names.smooth, empty(k))
        return layer

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def unknown_layers(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of the layers ``names`` of a checkpoint for which the model has no module at all."""
    modules = {name for name, _ in model.named_modules()}
    weights = [f"{name}.weight" for name in names]
    merged = renamed_alone(model, weights)
    unknown = []
    for weight, place in to_model_names(model, weights).items():
        key = None if place else expert_key(merged[weight])
        path = key.path if key is not None else (place or "").removesuffix(".weight")
        if path and path not in modules:
            unknown.append(weight.removesuffix(".weight"))
    return unknown


def make_ready_(model: PreTrainedModel) -> None:
    """Packs the 8-bit layers that are on the CPU for its kernels, and replaces modules by fused ones.

    Layers that hooks bring to a GPU for each call only, as those of an offloaded model, stay as they are.
    """
    for module in model.modules():
        if isinstance(module, W8A8Linear | W8A8Experts):
            module.prepack_()  # one at a time: each frees its plain weight
    fuse_(model)


def _rename_buffer(module: nn.Module, name: str, new_name: str, value: Tensor) -> None:
    """Replaces a buffer by another of a new name, in the same place of the state dict."""
    buffers = [(new_name, value) if key == name else (key, buffer) for key, buffer in module._buffers.items()]
    module._buffers.clear()
    module._buffers.update(buffers)
