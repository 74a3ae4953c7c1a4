"""Saves W8A8 models as Hugging Face directories: open formats, no pickle, nothing half-written."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import first_line, quiet_transformers
from ..errors import SmoothQuantError
from ..nn.embedding import shares_head
from ..nn.linear import W8A8Linear
from ..scheme import dtype_name
from .atomic import check_free_space, check_place, replace_directory
from .formats.base import Format
from .formats.registry import choose_format, config_files, parse_quantization_config
from .model_card import CARD, model_card
from .model_classes import check_loadable
from .naming import (
    checkpoint_names,
    count_quantized,
    float_tensors,
    has_untied_head,
    quantized_layers,
    rotated_in,
)
from .other_files import copy_files, other_files
from .reading import CONFIG, INDEX, find_quantization
from .record import RECORD, read_record
from .scales import is_positive, wrong_scale

FORMER_CARD = "README.original.md"  # that of another tool, see ``converting``

# The files that a save writes, those of tokenizers included. A directory with any other file is not replaced.
_OUR_FILES = (
    CONFIG,
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
    "target_vocab.json",
    "*.spm",
    "additional_chat_templates",
    RECORD,
    CARD,
    FORMER_CARD,
)


def check_destination(directory: str | os.PathLike[str]) -> Path:
    """The resolved directory, after checking that ``save`` may write it; call this before any long work.

    The directory may be absent, empty, or hold a W8A8 checkpoint and nothing else, which ``save`` replaces as a whole.

    Raises:
        SmoothQuantError: it is a file, holds something else, cannot be written, or has a name that is not UTF-8.
    """
    target = Path(directory).resolve()
    try:
        str(target).encode()
    except UnicodeEncodeError:
        raise SmoothQuantError(f"the name {os.fsencode(target)!r} is not UTF-8; choose another directory") from None
    if target.exists():
        if not target.is_dir():
            raise SmoothQuantError(f"{target} is a file; name a directory to save to")
        if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
            raise SmoothQuantError(f"{target} is not readable and writable; choose an empty or a new directory")
        copied = _copied_files(target)
        for entry in sorted(target.iterdir()):
            if entry.name not in copied and not any(fnmatchcase(entry.name, pattern) for pattern in _OUR_FILES):
                raise SmoothQuantError(f"{target} already holds {entry.name}; choose an empty or a new directory")
        if any(target.iterdir()):
            _check_replaceable(target)
    check_place(target)
    return target


def _copied_files(target: Path) -> Collection[str]:
    """The names in a directory that its record says were copied by the save that wrote it."""
    try:
        return list(map(str, read_record(target).get("files") or ()))
    except SmoothQuantError:  # there is none, or another one's
        return ()


def _check_replaceable(target: Path) -> None:
    try:
        configuration = find_quantization(target)
        if configuration is None:
            raise SmoothQuantError("not quantized")
        parse_quantization_config(configuration[0], str(configuration[1]))
    except SmoothQuantError:
        raise SmoothQuantError(
            f"{target} already holds something that is not a W8A8 checkpoint; choose an empty or a new directory"
        ) from None


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    format: str | None = None,  # noqa: A002
    max_shard_size: int | str = "5GB",
    files_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a quantized model as a Hugging Face directory that other engines can load too.

    A killed save leaves the previous directory or none. The files are config.json with the quantization_config,
    safetensors (with an index if there are several), generation_config.json, the tokenizer and its chat template,
    README.md, which is a model card, and smoothquant.json, the record of how the model was quantized, which other tools
    ignore. A model that was loaded keeps the record of its checkpoint.

    Args:
        model: a model of transformers, of any of its classes, with ``W8A8Linear`` layers, on any device.
        directory: the directory to write: absent, empty, or a W8A8 checkpoint, which is replaced.
        tokenizer: the tokenizer or processor to save with the model, if any.
        format: ``"compressed-tensors"`` (read by vLLM, SGLang, transformers), ``"lmdeploy"`` or ``"smoothquant-ext"``
            (read by this package alone); ``None`` is the first of these that can store the model, and the third where
            inputs are rotated at run time, because some readers of the first would not do that. Only the second stores
            FP8 e5m2, only the third explicit smoothing.
        max_shard_size: the most bytes of a safetensors file, as a number or like ``"5GB"``.
        files_from: the directory that the model comes from, whose other files go along: licence, processors, code.

    Raises:
        SmoothQuantError: nothing is quantized, the format cannot store the scheme, a scale is not positive and finite,
            ``load`` could not build the model's class again, or the directory cannot be written.
    """
    target = check_destination(directory)
    layers = _checked_layers(model)
    is_explicit = any(layer.smooth is not None for layer in layers.values())
    schemes = [scheme for scheme, _ in Counter(layer.scheme for layer in layers.values()).most_common()]
    fmt = choose_format(format, schemes, is_explicit, rotated_in(model, layers), shares_head(model))
    record = getattr(model, "smoothquant_record", None)
    others: list[Path] = []
    if files_from is not None:
        written = frozenset({CONFIG, INDEX, CARD, RECORD, *config_files()})
        others = [file for file, is_part in other_files(Path(files_from), besides=written) if is_part]
    if record is not None:
        record = with_files(record, others)
    blocks = Counter(layer.rotate for layer in layers.values() if layer.rotate)
    card = model_card(target.name, fmt, schemes, count_quantized(model), record, blocks, type(model).__name__)
    with quiet_transformers():
        tensors = _Tensors(model, layers, fmt)
        check_free_space(target, sum(tensors.sizes.values()))
        with replace_directory(target) as unfinished:
            if files_from is not None:
                copy_files(Path(files_from), unfinished, others)
            write_shards(unfinished, tensors.sizes, tensors.read, max_shard_size)
            _write_configs(model, tensors.names.quantization_config(fmt), unfinished)
            if record is not None:
                (unfinished / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (unfinished / CARD).write_text(card, encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)


def _checked_layers(model: PreTrainedModel) -> dict[str, W8A8Linear]:
    """The 8-bit layers of a model that can be saved."""
    adapted = any(name.rpartition(".")[2] == "base_layer" for name, _ in model.named_modules())
    if adapted or not isinstance(model, PreTrainedModel):
        raise SmoothQuantError(
            f"{type(model).__name__} "
            + ("has adapters" if adapted else "is no model of transformers")
            + "; save adapters with their own save_pretrained, and the model below them before it gets any"
        )
    layers = quantized_layers(model)
    if not layers:
        raise SmoothQuantError(f"{type(model).__name__} has no quantized layer; call quantize on it before saving")
    check_loadable(model)
    for name, layer in layers.items():
        wrong = [kind for kind in ("input_scale", "smooth") if not is_positive(getattr(layer, kind))]
        if wrong_scale(layer.weight_scale, layer.plain_weight) is not None:
            wrong = ["weight_scale", *wrong]
        if wrong:
            raise SmoothQuantError(
                f"{name}.{wrong[0]} is not positive and finite everywhere; the layer was quantized from damaged "
                "weights or activations, quantize the model again"
            )
    return layers


class _Tensors:
    """The tensors of a checkpoint by name: sizes at once, contents one at a time by ``read``.

    Packed weights are unpacked when they are read, so a save needs the memory of one shard.

    Attributes:
        sizes: the bytes of each tensor.
        names: the names of the layers in the checkpoint.
    """

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, W8A8Linear], fmt: Format) -> None:
        self.sizes: dict[str, int] = {}
        self._readers: dict[str, Callable[[], Tensor]] = {}
        floats = float_tensors(model)
        for name, tensor in floats.items():
            if tensor.is_meta:
                raise SmoothQuantError(f"{name} is offloaded to disk; load the model without offloading to save it")
            self._add(name, tensor.nbytes, partial(torch.Tensor.detach, tensor))
        self.names = checkpoint_names(model, layers, floats)
        for path, layer in layers.items():
            name = self.names.layers[path]
            for suffix, tensor in fmt.small_tensors(layer).items():
                self._add(f"{name}.{suffix}", tensor.nbytes, partial(torch.Tensor.detach, tensor))
            size = layer.out_features * layer.in_features * layer.scheme.dtype.itemsize
            self._add(f"{name}.weight", size, layer.plain_weight)
        for name, matrix in fmt.matrices({self.names.layers[path]: layers[path].rotate for path in layers}).items():
            self._add(name, matrix.nbytes, partial(torch.Tensor.detach, matrix))

    def _add(self, name: str, size: int, reader: Callable[[], Tensor]) -> None:
        self.sizes[name] = size
        self._readers[name] = reader

    def read(self, name: str) -> Tensor:
        """The tensor, to be written."""
        return own_copy(self._readers[name]())


def write_shards(
    directory: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_size: int | str,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes tensors to safetensors files, with an index if there are several; the memory of one file is needed.

    Args:
        directory: to write to.
        sizes: the bytes of each tensor.
        read: gives a tensor by its name, contiguous, on the CPU, in a storage of its own.
        max_shard_size: as in ``save``.
        metadata: of each file, besides its format.

    Raises:
        OSError: the files cannot be written.
        SmoothQuantError: ``max_shard_size`` is no size.
    """
    shards = _split(sizes, max_shard_size)
    try:
        for file, names in shards.filename_to_tensors.items():
            save_file({name: read(name) for name in names}, directory / file, metadata={**metadata, "format": "pt"})
    except SafetensorError as error:
        raise OSError(first_line(error)) from error  # as the file system says it; replace_directory names the place
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_files(record: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
    """The record with the names of copied files, so that another save may replace the directory."""
    names = {file.parts[0] for file in files}
    foreign = sorted(name for name in names if not any(fnmatchcase(name, pattern) for pattern in _OUR_FILES))
    return {key: value for key, value in record.items() if key != "files"} | ({"files": foreign} if foreign else {})


def own_copy(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in a storage of its own (safetensors refuses shared ones)."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _split(sizes: Mapping[str, int], max_shard_size: int | str) -> StateDictSplit:
    try:
        return split_state_dict_into_shards_factory(
            dict(sizes),
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise SmoothQuantError(f"max_shard_size {max_shard_size!r} is not a size like '5GB'") from error


def _write_configs(model: PreTrainedModel, quantization: dict[str, Any], directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    vars(config).pop("auto_map", None)  # names files of code that are not here; the class is transformers' own
    config.dtype = dtype_name(model.dtype)
    for name in config.sub_configs:  # as loading sets them
        part = getattr(config, name, None)
        if part is not None and part.dtype is None:
            part.dtype = config.dtype
    config.quantization_config = quantization
    if has_untied_head(model):
        config.tie_word_embeddings = False
    config.to_json_file(directory / CONFIG)
    if model.can_generate():
        # Not save_pretrained: it refuses settings that many published models have (a temperature without sampling).
        model.generation_config.to_json_file(directory / "generation_config.json")
