"""Converts a W8A8 checkpoint to another format, tensor by tensor, without building its model.

Every tensor but the scales of layers is copied byte for byte under its own name, those that the model's class does not
know included. So a tensor cannot get lost, or change its dtype, on a way through a model.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compat import first_line, quiet_transformers
from ..errors import SmoothQuantError
from ..nn.embedding import shares_head
from ..nn.linear import W8A8Linear
from ..scheme import Scheme
from .atomic import check_free_space, replace_directory
from .completeness import is_dropped, name_families
from .formats.base import Format
from .formats.registry import choose_format, config_files
from .hf_names import places_of, to_checkpoint_modules
from .hf_quantizer import W8A8Config, W8A8Quantizer
from .model_card import CARD, model_card
from .model_classes import model_class
from .naming import all_experts, rotated_parts
from .other_files import copy_files, other_files
from .reading import (
    CONFIG,
    COPY_AGAIN,
    EIGHT_BIT,
    INDEX,
    Checkpoint,
    CheckpointTensor,
    find_layers,
    names_of_8_bit_weights,
    open_checkpoint,
    read_config,
    read_tensors,
)
from .record import RECORD, read_record
from .saving import FORMER_CARD, check_destination, own_copy, with_files, write_shards
from .scales import is_zero_point
from .source_files import check_directory


@dataclass(frozen=True)
class Converted:
    """What ``convert`` did.

    Attributes:
        layers: how many modules have 8 bits; the experts of a mixture are one.
        unknown: the names of the tensors that the model's class has no place for, which were copied.
        dropped: those of them that ``drop`` matches, which were not.
        left_out: the files that were not copied, because they hold weights or belong to other tools.
    """

    layers: int
    unknown: tuple[str, ...]
    dropped: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A checkpoint and what its model says about it.

    Attributes:
        checkpoint: with the layers that the model has and those that it has not.
        model: on the meta device, with empty 8-bit layers.
        experts: the module, the number and the name of each layer of experts that the model holds in one module.
        unused: the scales that no layer uses.
        unknown: the tensors that the model has no place for and that are kept.
        dropped: those that are not.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    experts: Mapping[str, tuple[str, int, str]]
    unused: frozenset[str]
    unknown: tuple[str, ...]
    dropped: tuple[str, ...]

    def scheme(self, name: str) -> Scheme:
        """The scheme of a layer; experts' inputs have a scale per token, as ``load`` reads them."""
        scheme = self.checkpoint.layers[name].scheme
        return scheme.per_token if name in self.experts else scheme


def convert(
    directory: str | os.PathLike[str],
    target: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str = "5GB",
    drop: Sequence[str] = (),
    as_w8a8: bool = False,
) -> Converted:
    """Writes a W8A8 checkpoint of any tool in another format; every number stays what it is.

    What the target's format stores otherwise changes: the names, shapes and dtypes of the layers' scales (to fp32,
    which is exact), and the ``quantization_config``. Everything else is copied: tensors that the model's class has no
    place for, such as layers for multi-token prediction; keys of config.json; other files of the directory. Weights in
    other file formats are not. The model card of another tool is kept as README.original.md.

    Args:
        directory: a directory in one of ``formats.registry.FORMATS``.
        target: the directory to write: absent, empty, or a W8A8 checkpoint, which is replaced.
        format: as in ``save``.
        max_shard_size: as in ``save``.
        drop: shell patterns for names of tensors that the model's class has no place for and that are not copied.
        as_w8a8: as in ``load``.

    Raises:
        SmoothQuantError: the checkpoint cannot be read as ``load`` reads it, the format cannot store it, a tensor has 8
            bits and is no layer's weight, or the target cannot be written or is the checkpoint itself.
    """
    path, place = Path(directory), check_destination(target)
    if place == path.resolve() or path.resolve() in place.parents:
        raise SmoothQuantError(f"{target} is the checkpoint to convert, or lies in it; name another directory")
    with quiet_transformers():
        source = _read(path, drop, as_w8a8)
    checkpoint = source.checkpoint
    schemes = [scheme for scheme, _ in Counter(map(source.scheme, checkpoint.layers)).most_common()]
    blocks = {name: layer.rotate for name, layer in checkpoint.layers.items()}
    explicit = any(layer.smooth for layer in checkpoint.layers.values())
    rotated = rotated_parts(blocks, source.experts)
    fmt = choose_format(format, schemes, explicit, rotated, shares_head(source.model))
    files = list(other_files(path, besides=frozenset({CONFIG, INDEX, *config_files(), *_weight_files(checkpoint)})))
    record = _record(path)
    written = (CARD,) if record is None else (CARD, RECORD)
    copied = [file for file, is_part in files if is_part and str(file) not in written]
    layers = len({all_experts(name) if name in source.experts else name for name in checkpoint.layers})
    kind = type(source.model).__name__
    card = model_card(place.name, fmt, schemes, layers, record, Counter(filter(None, blocks.values())), kind)
    with ExitStack() as stack:
        tensors = _Tensors(source, fmt, stack)
        check_free_space(place, sum(tensors.sizes.values()) + sum((path / file).stat().st_size for file in copied))
        with replace_directory(place) as unfinished:
            copy_files(path, unfinished, copied)
            write_shards(unfinished, tensors.sizes, tensors.read, max_shard_size, tensors.metadata)
            _write_config(path, unfinished, _quantization_config(source, fmt))
            if record is not None:
                text = json.dumps(with_files(record, copied), indent=1) + "\n"
                (unfinished / RECORD).write_text(text, encoding="utf-8")
            elif (path / CARD).is_file():
                (unfinished / FORMER_CARD).write_bytes((path / CARD).read_bytes())
            (unfinished / CARD).write_text(card, encoding="utf-8")
    left_out = tuple(str(file) for file, is_part in files if not is_part)
    return Converted(layers, source.unknown, source.dropped, left_out)


def _read(path: Path, drop: Sequence[str], as_w8a8: bool) -> _Source:
    """Reads a checkpoint with the checks that ``load`` makes, on a model that has no memory for its weights."""
    check_directory(path)
    stored = open_checkpoint(path, as_w8a8)
    model = _skeleton(path)
    quantizer = W8A8Quantizer(W8A8Config(str(path), as_w8a8=as_w8a8))
    quantizer._process_model_before_weight_loading(model)
    known, experts = quantizer.checkpoint, quantizer.experts
    _check_missing(stored, model, list(experts.readings))
    roles = {name for layer in known.layers for name in _tensors_of(layer, stored)}
    state = model.state_dict()
    places = places_of(model, stored.tensors.keys() - roles)
    unknown = sorted(name for name, place in places.items() if place not in state and name not in quantizer.unused)
    dropped = tuple(name for name in unknown if is_dropped(name, drop))
    tensors = {name: tensor for name, tensor in stored.tensors.items() if name not in dropped}
    layers = dict(known.layers)
    of_unknown = {name: tensors[name] for name in unknown if name in tensors}
    if names_of_8_bit_weights(of_unknown):
        layers |= find_layers(replace(stored, tensors=of_unknown)).layers
    checkpoint = replace(stored, tensors=tensors, layers=layers)
    _check_8_bit(checkpoint)
    kept = tuple(name for name in unknown if name in tensors)
    return _Source(checkpoint, model, experts.paths, quantizer.unused, kept, dropped)


def _skeleton(path: Path) -> PreTrainedModel:
    """The model of a directory on the meta device, of the class that its configuration names."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = model_class(config, str(path))
        config.quantization_config = None
        with torch.device("meta"):
            model = kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    except SmoothQuantError:
        raise
    except Exception as error:  # whatever transformers raises for a configuration it cannot build
        raise SmoothQuantError(f"{path}: transformers cannot load this model ({first_line(error)})") from error
    return cast(PreTrainedModel, model)


def _tensors_of(layer: str, checkpoint: Checkpoint) -> list[str]:
    """The names that the tensors of a layer have in the files."""
    return [f"{layer}.weight", f"{layer}.bias", *_scales_of(layer, checkpoint)]


def _scales_of(layer: str, checkpoint: Checkpoint) -> list[str]:
    """The names that the scales and zero points of a layer have in the files, if it has them."""
    names = checkpoint.quantization.fmt.tensors
    zero_points = names.weight_zero_point, names.input_zero_point
    suffixes = (names.weight_scale, names.input_scale, names.smooth, *zero_points)
    return [f"{layer}.{suffix}" for suffix in suffixes if suffix is not None]


def _check_8_bit(checkpoint: Checkpoint) -> None:
    """Refuses 8-bit tensors that another format might store otherwise."""
    for name, tensor in checkpoint.tensors.items():
        is_weight = name.endswith(".weight") and name.removesuffix(".weight") in checkpoint.layers
        if tensor.dtype in EIGHT_BIT.values() and not is_weight and not is_zero_point(name):
            raise SmoothQuantError(
                f"{tensor.file}: {name} is {tensor} and not the weight of a linear layer, so it is not known how "
                "another format stores it; leave it out with --drop"
            )


def _check_missing(checkpoint: Checkpoint, model: PreTrainedModel, experts: Sequence[str]) -> None:
    """Refuses a checkpoint that lacks a tensor; those of layers and of experts are known to be there."""
    there = set(places_of(model, checkpoint.tensors).values())
    computed = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [
        name
        for name in model.state_dict()
        if name not in there
        and name not in computed
        and not any(name.startswith(f"{path}.") for path in experts)
        and not any(pattern.search(name) for pattern in optional)
    ]
    if missing:
        raise SmoothQuantError(
            f"{checkpoint.directory} lacks {name_families(missing)}, which config.json calls for; {COPY_AGAIN}"
        )


class _Tensors:
    """The tensors of the converted checkpoint by name: sizes at once, contents one at a time by ``read``.

    Attributes:
        sizes: the bytes of each tensor.
        metadata: that of the source's files.
    """

    def __init__(self, source: _Source, fmt: Format, stack: ExitStack) -> None:
        self._stored = source.checkpoint.tensors
        files = sorted({tensor.file for tensor in self._stored.values()})
        self._handles = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        self.metadata: dict[str, str] = {}
        for handle in self._handles.values():
            self.metadata |= handle.metadata() or {}
        replaced = {name for layer in source.checkpoint.layers for name in _scales_of(layer, source.checkpoint)}
        self.sizes = {
            name: _bytes(tensor)
            for name, tensor in self._stored.items()
            if name not in replaced and name not in source.unused
        }
        self._small = {
            f"{name}.{suffix}": tensor
            for name, layer in _small_layers(source).items()
            for suffix, tensor in fmt.small_tensors(layer).items()
        }
        self._small |= fmt.matrices({name: layer.rotate for name, layer in source.checkpoint.layers.items()})
        self.sizes |= {name: tensor.nbytes for name, tensor in self._small.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, to be written."""
        if name in self._small:
            return own_copy(self._small[name])
        return own_copy(self._handles[self._stored[name].file].get_tensor(name))


def _bytes(tensor: CheckpointTensor) -> int:
    """The size of a tensor; safetensors names dtypes by their bits, besides BOOL."""
    bits = re.search(r"\d+", tensor.dtype)
    return math.prod(tensor.shape) * (8 if bits is None else int(bits[0])) // 8


def _small_layers(source: _Source) -> dict[str, W8A8Linear]:
    """The layers of a checkpoint with all their tensors but the weight."""
    checkpoint = source.checkpoint
    names = checkpoint.quantization.fmt.tensors
    wanted = [name for layer in checkpoint.layers for name in _scales_of(layer, checkpoint)]
    scales = dict(read_tensors(checkpoint.tensors, wanted))
    layers = {}
    for name, of in checkpoint.layers.items():
        layer = W8A8Linear(of.in_features, of.out_features, False, source.scheme(name), device="meta")
        layer.weight_scale = scales[f"{name}.{names.weight_scale}"].reshape(-1, 1)
        layer.weight_scale = layer.weight_scale if layer.scheme.weight == "channel" else layer.weight_scale[0]
        if of.input_scale_shape is not None:
            layer.input_scale = scales[f"{name}.{names.input_scale}"].reshape(1)
        if of.zero_point_shape is not None:
            layer.input_zero_point = scales[f"{name}.{names.input_zero_point}"].reshape(1)
        if of.smooth:
            layer.smooth = scales[f"{name}.{names.smooth}"]
        layers[name] = layer
    return layers


def _quantization_config(source: _Source, fmt: Format) -> dict[str, Any]:
    """The configuration of the converted checkpoint, which names layers as the files do and as the model does."""
    model, checkpoint = source.model, source.checkpoint
    places = places_of(model, [f"{name}.weight" for name in checkpoint.layers])
    modules = dict(model.named_modules())
    schemes: dict[str, Scheme] = {}
    blocks = dict.fromkeys(filter(None, modules), 0)
    for name, of in checkpoint.layers.items():
        if name in source.experts:
            path, expert, layer = source.experts[name]
            both = name, f"{path}.{expert}.{layer}"
        else:
            both = name, places[f"{name}.weight"].removesuffix(".weight")
        blocks |= dict.fromkeys(both, of.rotate)
        targets = map(all_experts, both) if name in source.experts else both
        schemes |= dict.fromkeys(targets, source.scheme(name))
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    embeddings = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    matrices = [
        name
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name.removesuffix(".weight") not in checkpoint.layers
    ]
    embedded = {f"{path}.weight" for path in embeddings}
    others = sorted(
        name.removesuffix(".weight") for name, place in places_of(model, matrices).items() if place not in embedded
    )
    names = to_checkpoint_modules(model, linears)
    ignore = list(dict.fromkeys([*names.values(), *linears, *others]))
    return fmt.quantization_config(schemes, ignore) | fmt.rotation_config(blocks, ignore)


def _record(path: Path) -> dict[str, Any] | None:
    """The record of a checkpoint, ``None`` if it has none; one that cannot be read is copied like any other file."""
    try:
        return read_record(path) if (path / RECORD).is_file() else None
    except SmoothQuantError as error:
        warnings.warn(f"{error}; it is copied as it is, and the model card does without it", stacklevel=3)
        return None


def _write_config(source: Path, target: Path, quantization: Mapping[str, Any]) -> None:
    """Writes config.json with another ``quantization_config``; no other key changes."""
    config = {key: value for key, value in read_config(source).items() if key != "compression_config"}
    text = json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n"
    (target / CONFIG).write_text(text, encoding="utf-8")


def _weight_files(checkpoint: Checkpoint) -> set[str]:
    return {tensor.file.name for tensor in checkpoint.tensors.values()}
