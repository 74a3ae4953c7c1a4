"""Reads the configuration and the headers of a W8A8 checkpoint, and checks them before any model is built."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SmoothQuantError
from ..hadamard import BLOCKS
from ..scheme import Scheme, scheme_of
from .formats.base import CONVERT_AGAIN, QuantizationMap
from .formats.registry import config_files, file_with_details, parse_quantization_config, why_float
from .formats.transforms import block_of, is_sylvester

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPY_AGAIN = "copy or download the checkpoint again"

# safetensors' names of the dtypes that matter here.
EIGHT_BIT = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_INTEGERS = ("I8", "I32", "I64")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ONE_SCALE = ((1,), (), (1, 1))  # shapes of a scale per tensor; the first is the one to expect


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint, as its header describes it (dtype in safetensors' spelling)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class CheckpointLayer:
    """One quantized linear layer of a checkpoint, whose tensors agree with its scheme.

    Attributes:
        scheme: dtype and granularity, from the configuration or, where that is silent, from the shapes.
        out_features: N.
        in_features: K.
        bias: whether a bias [N] is stored.
        weight_scale_shape: [N, 1], [N], [1], ... as stored.
        input_scale_shape: the shape of the static activation scale, ``None`` for dynamic schemes and experts.
        zero_point_shape: the shape of the zero point of static asymmetric activations, else ``None``.
        smooth: whether an explicit smoothing scale [K] is stored.
        rotate: the size of the blocks of its input that are rotated at run time, 0 for none.
    """

    scheme: Scheme
    out_features: int
    in_features: int
    bias: bool
    weight_scale_shape: tuple[int, ...]
    input_scale_shape: tuple[int, ...] | None
    zero_point_shape: tuple[int, ...] | None
    smooth: bool
    rotate: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A W8A8 checkpoint: its quantization map, its tensors and its quantized layers, by their names in the files.

    The matrices of rotations, which are checked and then not needed, are not among its tensors.
    """

    directory: Path
    quantization: QuantizationMap
    tensors: Mapping[str, CheckpointTensor]
    layers: Mapping[str, CheckpointLayer]

    @property
    def float_dtype(self) -> torch.dtype:
        """The dtype of the largest tensor that is not quantized, usually the embedding."""
        floats = [tensor for tensor in self.tensors.values() if tensor.dtype in _FLOATS]
        return _FLOATS[max(floats, key=lambda tensor: math.prod(tensor.shape)).dtype]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        SmoothQuantError: the directory does not exist, has no config.json, or that is not a JSON object.
    """
    if not directory.is_dir():
        raise SmoothQuantError(f"{directory} is not a directory; name the directory of a saved model")
    return read_json(directory / CONFIG, "name the directory of a saved model")


def find_quantization(directory: Path) -> tuple[Any, Path] | None:
    """The ``quantization_config`` of a model directory and the file that holds it, ``None`` if it is not quantized.

    A configuration that quantizes no weights is none, with a warning that says so.

    Raises:
        SmoothQuantError: as ``read_config``.
    """
    found = _find_configuration(directory, read_config(directory))
    if found is not None and (reason := why_float(found[0], str(found[1]))):
        warnings.warn(reason, stacklevel=2)
        return None
    return found


def _find_configuration(directory: Path, config: Mapping[str, Any]) -> tuple[Any, Path] | None:
    for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' former name
        if (raw := config.get(key)) is not None:
            inner = raw.get("quantization_config") if key == "compression_config" and isinstance(raw, dict) else None
            details = file_with_details(raw)
            if details is not None and (directory / details).is_file():
                return read_json(directory / details, COPY_AGAIN), directory / details
            return inner or raw, directory / CONFIG
    files = [directory / name for name in config_files() if (directory / name).is_file()]
    return (read_json(files[0], COPY_AGAIN), files[0]) if files else None


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads the configuration and the headers of a W8A8 checkpoint, and checks that they agree.

    Raises:
        SmoothQuantError: a file or tensor is missing, truncated, unreadable, of the wrong shape or dtype, or not W8A8.
    """
    return find_layers(open_checkpoint(directory))


def open_checkpoint(directory: Path, as_w8a8: bool = False) -> Checkpoint:
    """Reads the configuration and the headers of a W8A8 checkpoint, which has no ``layers`` yet.

    Args:
        directory: the checkpoint's.
        as_w8a8: whether 8-bit weights whose activations are in floating point will do.

    Raises:
        SmoothQuantError: as ``read_checkpoint``.
    """
    configuration = find_quantization(directory)
    if configuration is None:
        raise SmoothQuantError(f"{directory} is not quantized; run it through 'smoothquant quantize' first")
    quantization = parse_quantization_config(configuration[0], str(configuration[1]), as_w8a8)
    tensors = read_headers(directory)
    quantization = replace(quantization, fmt=quantization.fmt.variant(tensors))
    return Checkpoint(directory, quantization, _without_matrices(quantization, tensors), {})


def _without_matrices(
    quantization: QuantizationMap, tensors: Mapping[str, CheckpointTensor]
) -> dict[str, CheckpointTensor]:
    """The tensors without the matrices of rotations, which are checked."""
    others = dict(tensors)
    for transform in quantization.transforms:
        sizes = BLOCKS if transform.block is None else (transform.block,)
        for name in [name for name in others if f".{name}".endswith(f".{transform.matrix}")]:
            del others[name]
            fits = tensors[name].shape in [(size, size) for size in sizes]  # else it may be too large to be read
            if not fits or not all(is_sylvester(matrix) for _, matrix in read_tensors(tensors, [name])):
                raise SmoothQuantError(
                    f"{tensors[name].file}: {name}, {tensors[name]}, is not Sylvester's Hadamard matrix of 1 and -1 of "
                    f"the size {' or '.join(map(str, sorted(sizes)))}, which alone is supported; {CONVERT_AGAIN}"
                )
    return others


def find_layers(
    checkpoint: Checkpoint, experts: Collection[str] = (), names: Mapping[str, tuple[str, ...]] | None = None
) -> Checkpoint:
    """Finds the quantized layers of a checkpoint, and checks the shapes and dtypes of their tensors.

    Args:
        checkpoint: from ``open_checkpoint``.
        experts: the names of the layers whose inputs get a scale per token whatever the configuration says.
        names: all names of each layer, which the configuration may use, that in the files first; ``None`` knows those
            in the files alone.

    Raises:
        SmoothQuantError: as ``read_checkpoint``.
    """
    layers = dict(_layers(checkpoint.quantization, checkpoint.tensors, experts, names or {}))
    if not layers:
        raise SmoothQuantError(f"{checkpoint.directory} says it is quantized but holds no 8-bit weight; {COPY_AGAIN}")
    return replace(checkpoint, layers=layers)


def names_of_8_bit_weights(tensors: Mapping[str, CheckpointTensor]) -> list[str]:
    """The names of the modules whose ``weight`` has 8 bits."""
    return [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in EIGHT_BIT.values()
    ]


def _layers(
    quantization: QuantizationMap,
    tensors: Mapping[str, CheckpointTensor],
    experts: Collection[str],
    names: Mapping[str, tuple[str, ...]],
) -> Iterator[tuple[str, CheckpointLayer]]:
    scale_suffix = "." + quantization.fmt.tensors.weight_scale
    for name in sorted(names_of_8_bit_weights(tensors)):
        weight = tensors[name + ".weight"]
        if name + scale_suffix not in tensors:
            raise SmoothQuantError(
                f"{weight.file}: {name}.weight is {weight.dtype} but {name}{scale_suffix} is missing; {COPY_AGAIN}"
            )
        all_names = names.get(name, (name,))
        scheme = _choose_scheme(name, quantization.schemes_of(*all_names), quantization, tensors)
        yield name, _layer(all_names, scheme, quantization, tensors, is_expert=name in experts)


def _choose_scheme(
    name: str, schemes: Sequence[Scheme], quantization: QuantizationMap, tensors: Mapping[str, CheckpointTensor]
) -> Scheme | None:
    """The first of the schemes that the tensors of a layer agree with, else the first, else ``None``."""
    names = quantization.fmt.tensors
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.{names.weight_scale}"]
    is_static = f"{name}.{names.input_scale}" in tensors
    is_symmetric = f"{name}.{names.input_zero_point}" not in tensors
    for scheme in schemes if len(schemes) > 1 else ():
        per_channel = math.prod(scale.shape) == weight.shape[0]
        if (
            weight.dtype == EIGHT_BIT[scheme.dtype]
            and per_channel == (scheme.weight == "channel")
            and is_static == scheme.is_static
            and (is_symmetric or not scheme.symmetric)
        ):
            return scheme
    return next(iter(schemes), None)


def _layer(
    all_names: Sequence[str],
    scheme: Scheme | None,
    quantization: QuantizationMap,
    tensors: Mapping[str, CheckpointTensor],
    is_expert: bool,
) -> CheckpointLayer:
    name, names = all_names[0], quantization.fmt.tensors
    weight = tensors[name + ".weight"]
    if scheme is None:
        raise SmoothQuantError(
            f"{weight.file}: {name} is quantized but {CONFIG} says it is not; the directory mixes two checkpoints, "
            f"{COPY_AGAIN}"
        )
    expected = EIGHT_BIT[scheme.dtype]
    if weight.dtype != expected or len(weight.shape) != 2:
        raise SmoothQuantError(
            f"{weight.file}: {name}.weight is {weight}, expected {expected} [N, K] for scheme {scheme.name!r}; "
            f"{COPY_AGAIN}"
        )
    n, k = weight.shape
    scale_name = f"{name}.{names.weight_scale}"
    if not quantization.complete:
        one = math.prod(tensors[scale_name].shape) == 1 and n > 1
        per_channel = quantization.fmt.weight_scale_is_per_channel or not one
        scheme = scheme_of(scheme.dtype, "channel" if per_channel else "tensor", scheme.activation)
    shapes = ((n, 1), (n,)) if scheme.weight == "channel" else _ONE_SCALE
    weight_scale_shape = _check_scale(scale_name, tensors[scale_name], shapes)
    input_scale_shape = zero_point_shape = None
    if scheme.is_static and not is_expert:
        scale = _static_tensor(name, names.input_scale, tensors)
        input_scale_shape = _check_scale(f"{name}.{names.input_scale}", scale, _ONE_SCALE)
        if not scheme.symmetric:
            zero_point = _static_tensor(name, names.input_zero_point, tensors)
            zero_point_shape = _check_scale(f"{name}.{names.input_zero_point}", zero_point, _ONE_SCALE, _INTEGERS)
    bias = tensors.get(name + ".bias")
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != (n,)):
        raise SmoothQuantError(f"{bias.file}: {name}.bias is {bias}, expected a float [{n}]; {COPY_AGAIN}")
    smooth = tensors.get(f"{name}.{names.smooth}")
    if smooth is not None:
        _check_scale(f"{name}.{names.smooth}", smooth, ((k,),))
    return CheckpointLayer(
        scheme=scheme,
        out_features=n,
        in_features=k,
        bias=bias is not None,
        weight_scale_shape=weight_scale_shape,
        input_scale_shape=input_scale_shape,
        zero_point_shape=zero_point_shape,
        smooth=smooth is not None,
        rotate=block_of(quantization.transforms, all_names, k, str(weight.file)),
    )


def _static_tensor(layer: str, suffix: str | None, tensors: Mapping[str, CheckpointTensor]) -> CheckpointTensor:
    name = f"{layer}.{suffix}"
    if name not in tensors:
        raise SmoothQuantError(
            f"{tensors[layer + '.weight'].file}: {CONFIG} says that activations are static but {name} is missing; "
            f"{COPY_AGAIN}"
        )
    return tensors[name]


def _check_scale(
    name: str, scale: CheckpointTensor, shapes: tuple[tuple[int, ...], ...], dtypes: Iterable[str] = _FLOATS
) -> tuple[int, ...]:
    """The shape of a scale or zero point, which must be one of ``shapes``; the first is named in the error."""
    if scale.dtype not in dtypes or scale.shape not in shapes:
        kind = "a float" if dtypes is _FLOATS else "an integer"
        raise SmoothQuantError(f"{scale.file}: {name} is {scale}, expected {kind} {list(shapes[0])}; {COPY_AGAIN}")
    return scale.shape


def read_tensors(tensors: Mapping[str, CheckpointTensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors ``names`` in fp32, without those that the checkpoint lacks; each file is opened once."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name in tensors:
            by_file.setdefault(tensors[name].file, []).append(name)
    for file, in_file in by_file.items():
        with safe_open(file, framework="pt") as handle:
            for name in in_file:
                yield name, handle.get_tensor(name).float()


def read_headers(directory: Path) -> dict[str, CheckpointTensor]:
    """The tensors of a directory by name, from the headers of its safetensors files.

    Raises:
        SmoothQuantError: a file or a tensor that the index names is missing, or a file is damaged.
    """
    if (directory / WEIGHTS).is_file():
        return dict(_read_header(directory / WEIGHTS))
    if not (directory / INDEX).is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        content = f"only the pickled {pickled[0]}" if pickled else "neither"
        raise SmoothQuantError(
            f"{directory} has {content}, expected {WEIGHTS} or {INDEX}; {'convert it' if pickled else COPY_AGAIN}"
        )
    weight_map = read_json(directory / INDEX, COPY_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SmoothQuantError(f"{directory / INDEX} has no weight_map; {COPY_AGAIN}")
    tensors: dict[str, CheckpointTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise SmoothQuantError(f"{directory / file} is missing, though {INDEX} names it; {COPY_AGAIN}")
        tensors.update(_read_header(directory / file))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise SmoothQuantError(f"{directory / weight_map[missing[0]]} lacks the tensor {missing[0]}; {COPY_AGAIN}")
    return tensors


def _read_header(file: Path) -> Iterator[tuple[str, CheckpointTensor]]:
    try:
        with safe_open(file, framework="pt") as handle:  # refuses a file whose size is not what its header adds up to
            for name in handle.keys():  # noqa: SIM118  (it is not a mapping)
                view = handle.get_slice(name)
                yield name, CheckpointTensor(file, view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise SmoothQuantError(f"{file} is truncated or not a safetensors file ({error}); {COPY_AGAIN}") from error


def read_json(path: Path, advice: str) -> dict[str, Any]:
    if not path.is_file():
        raise SmoothQuantError(f"{path} does not exist; {advice}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{path} cannot be read as JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise SmoothQuantError(f"{path} holds {type(value).__name__}, expected a JSON object; {COPY_AGAIN}")
    return value
