"""What a W8A8 checkpoint directory holds, read from its headers and checked before any model is built."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SmoothQuantError
from ..scheme import Scheme, scheme_of
from .formats.registry import Layout, parse_quantization_config

CONFIG = "config.json"
MODELOPT_CONFIG = "hf_quant_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPY_AGAIN = "copy or download the checkpoint again"
ZERO_POINT = "input_zero_point"  # of static asymmetric activations, in compressed-tensors

# safetensors' names of the dtypes that matter here.
_EIGHT_BIT = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
_INTEGERS = ("I8", "I32", "I64")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint, as its header describes it (dtype in safetensors' spelling)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredLayer:
    """One quantized linear layer of the checkpoint; its tensors are consistent with its scheme.

    Attributes:
        scheme: dtype and granularity, from the configuration.
        out_features: N.
        in_features: K.
        bias: whether a bias is stored.
        weight_scale_shape: [N, 1], [N], [1], ... as stored.
        input_scale_shape: the same for the static activation scale, ``None`` for dynamic schemes.
        zero_point_shape: the same for the zero point of static asymmetric activations, else ``None``.
        smooth: whether an explicit smoothing scale [K] is stored.
    """

    scheme: Scheme
    out_features: int
    in_features: int
    bias: bool
    weight_scale_shape: tuple[int, ...]
    input_scale_shape: tuple[int, ...] | None
    zero_point_shape: tuple[int, ...] | None
    smooth: bool


@dataclass(frozen=True)
class StoredCheckpoint:
    """A W8A8 checkpoint: its layout, its tensors and its quantized layers, by their names in the files."""

    directory: Path
    layout: Layout
    tensors: Mapping[str, StoredTensor]
    layers: Mapping[str, StoredLayer]

    @property
    def float_dtype(self) -> torch.dtype:
        """Of the largest tensor that is not quantized, usually the embedding."""
        floats = [tensor for tensor in self.tensors.values() if tensor.dtype in _FLOATS]
        return _FLOATS[max(floats, key=lambda tensor: math.prod(tensor.shape)).dtype]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        SmoothQuantError: no such directory, no config.json in it, or it is not a JSON object.
    """
    if not directory.is_dir():
        raise SmoothQuantError(f"{directory} is not a directory; name the directory of a saved model")
    return _read_json(directory / CONFIG, "name the directory of a saved model")


def find_quantization(directory: Path) -> tuple[Any, Path] | None:
    """What a model directory says of its quantization and the file that says it, ``None`` if it is not quantized.

    Raises:
        SmoothQuantError: as ``read_config``.
    """
    config = read_config(directory)
    for key in ("quantization_config", "compression_config"):  # the second is compressed-tensors' former name
        if (raw := config.get(key)) is not None:
            inner = raw.get("quantization_config") if key == "compression_config" and isinstance(raw, dict) else None
            return inner or raw, directory / CONFIG
    modelopt = directory / MODELOPT_CONFIG
    return (_read_json(modelopt, COPY_AGAIN), modelopt) if modelopt.is_file() else None


def read_checkpoint(directory: Path) -> StoredCheckpoint:
    """Reads the configuration, the headers and the scales of a W8A8 checkpoint, and checks that they agree.

    Raises:
        SmoothQuantError: a file or tensor is missing, truncated, unreadable, of the wrong shape or dtype, or not W8A8.
    """
    found = find_quantization(directory)
    if found is None:
        raise SmoothQuantError(f"{directory} is not quantized; run it through 'smoothquant quantize' first")
    layout = parse_quantization_config(found[0], str(found[1]))
    tensors = _read_headers(directory)
    layout = layout.spelled_as(tensors)
    layers = dict(_layers(layout, tensors))
    if not layers:
        raise SmoothQuantError(f"{directory} says it is quantized but holds no 8-bit weight; {COPY_AGAIN}")
    return StoredCheckpoint(directory, layout, tensors, layers)


def _layers(layout: Layout, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredLayer]]:
    scale_suffix = "." + layout.fmt.weight_scale
    eight_bit = {
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dtype in _EIGHT_BIT.values()
    }
    # A tensor may be called `scale` without belonging to a linear layer, so a scale counts only beside a weight.
    scaled = {
        name.removesuffix(scale_suffix)
        for name in tensors
        if name.endswith(scale_suffix) and name.removesuffix(scale_suffix) + ".weight" in tensors
    }
    for name in sorted(eight_bit | scaled):
        weight = tensors[name + ".weight"]
        if name not in scaled:
            raise SmoothQuantError(
                f"{weight.file}: {name}.weight is {weight.dtype} but {name}{scale_suffix} is missing; {COPY_AGAIN}"
            )
        yield name, _layer(name, layout, tensors)
    if layout.complete:
        for name, tensor in tensors.items():
            if name.endswith(scale_suffix) and name.removesuffix(scale_suffix) not in scaled:
                wanted = name.removesuffix(scale_suffix) + ".weight"
                raise SmoothQuantError(f"{tensor.file}: {name} is stored but {wanted} is missing; {COPY_AGAIN}")
    _check_values(layout, tensors, scaled)


def _layer(name: str, layout: Layout, tensors: Mapping[str, StoredTensor]) -> StoredLayer:
    weight = tensors[name + ".weight"]
    scheme = layout.scheme_of(name)
    if scheme is None:
        raise SmoothQuantError(
            f"{weight.file}: {name} is quantized but {CONFIG} says it is not; the directory mixes two checkpoints, "
            f"{COPY_AGAIN}"
        )
    expected = _EIGHT_BIT[scheme.dtype]
    if weight.dtype != expected or len(weight.shape) != 2:
        raise SmoothQuantError(
            f"{weight.file}: {name}.weight is {weight.dtype} {list(weight.shape)}, expected {expected} [N, K] for "
            f"scheme {scheme.name!r}; {COPY_AGAIN}"
        )
    n, k = weight.shape
    scale_name = f"{name}.{layout.fmt.weight_scale}"
    if not layout.complete:
        per_tensor = math.prod(tensors[scale_name].shape) == 1 and n > 1 and layout.fmt.name != "lmdeploy"
        scheme = scheme_of(scheme.dtype, "tensor" if per_tensor else "channel", scheme.activation)
    per_channel = scheme.weight == "channel"
    allowed = ((n, 1), (n,)) if per_channel else ((1,), (), (1, 1))
    weight_scale_shape = _scale_shape(scale_name, tensors[scale_name], allowed)
    static = {}
    if scheme.is_static:
        suffixes = (layout.fmt.input_scale, *([] if scheme.symmetric else [ZERO_POINT]))
        for input_name in (f"{name}.{suffix}" for suffix in suffixes):
            if input_name not in tensors:
                raise SmoothQuantError(
                    f"{weight.file}: {CONFIG} says that activations are static but {input_name} is missing; "
                    f"{COPY_AGAIN}"
                )
            static[input_name] = _scale_shape(input_name, tensors[input_name], ((1,), (), (1, 1)))
    bias = tensors.get(name + ".bias")
    if bias is not None and (bias.dtype not in _FLOATS or bias.shape != (n,)):
        raise SmoothQuantError(
            f"{bias.file}: {name}.bias is {bias.dtype} {list(bias.shape)}, expected a float [{n}]; {COPY_AGAIN}"
        )
    smooth_name = f"{name}.{layout.fmt.smooth}"
    if has_smooth := layout.fmt.smooth is not None and smooth_name in tensors:
        _scale_shape(smooth_name, tensors[smooth_name], ((k,),))
    input_scale_shape, zero_point_shape = (*static.values(), None, None)[:2]
    return StoredLayer(
        scheme, n, k, bias is not None, weight_scale_shape, input_scale_shape, zero_point_shape, has_smooth
    )


def _scale_shape(name: str, scale: StoredTensor, allowed: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    allowed = tuple(allowed)
    kinds, kind = (_INTEGERS, "an integer") if name.endswith(ZERO_POINT) else (_FLOATS, "a float")
    if scale.dtype not in kinds or scale.shape not in allowed:
        raise SmoothQuantError(
            f"{scale.file}: {name} is {scale.dtype} {list(scale.shape)}, expected {kind} {list(allowed[0])}; "
            f"{COPY_AGAIN}"
        )
    return scale.shape


def _check_values(layout: Layout, tensors: Mapping[str, StoredTensor], layers: Iterable[str]) -> None:
    """Reads every scale and zero point; they are a thousandth of the weights."""
    fmt = layout.fmt
    suffixes = [suffix for suffix in (fmt.weight_scale, fmt.input_scale, fmt.smooth) if suffix is not None]
    scales = [f"{layer}.{suffix}" for layer in layers for suffix in suffixes]
    zero_points = [f"{layer}.weight_zero_point" for layer in layers]
    zero_points += [f"{layer}.{ZERO_POINT}" for layer in layers if _is_symmetric(layout.scheme_of(layer))]
    for name, value in _read_tensors(tensors, scales):
        bad = ~(value.isfinite() & (value > 0))
        if bad.any():
            raise SmoothQuantError(
                f"{tensors[name].file}: {name} holds {value[bad].flatten()[0].item()}, expected positive finite "
                "numbers; the layer was quantized from damaged weights, quantize the model again"
            )
    for name, value in _read_tensors(tensors, zero_points):
        if value.any():
            raise SmoothQuantError(f"{tensors[name].file}: {name} is not zero, expected symmetric quantization")


def _is_symmetric(scheme: Scheme | None) -> bool:
    return scheme is None or scheme.symmetric


def _read_tensors(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[str]] = {}
    for name in names:
        if name in tensors:
            by_file.setdefault(tensors[name].file, []).append(name)
    for file, stored in by_file.items():
        with safe_open(file, framework="pt") as handle:
            for name in stored:
                yield name, handle.get_tensor(name).float()


def _read_headers(directory: Path) -> dict[str, StoredTensor]:
    if (directory / WEIGHTS).is_file():
        return dict(_read_header(directory / WEIGHTS))
    if not (directory / INDEX).is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        found = f"only the pickled {pickled[0]}" if pickled else "neither"
        raise SmoothQuantError(
            f"{directory} has {found}, expected {WEIGHTS} or {INDEX}; {'convert it' if pickled else COPY_AGAIN}"
        )
    weight_map = _read_json(directory / INDEX, COPY_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise SmoothQuantError(f"{directory / INDEX} has no weight_map; {COPY_AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise SmoothQuantError(f"{directory / file} is missing, though {INDEX} names it; {COPY_AGAIN}")
        tensors.update(_read_header(directory / file))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise SmoothQuantError(f"{directory / weight_map[missing[0]]} lacks the tensor {missing[0]}; {COPY_AGAIN}")
    return tensors


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(file, framework="pt") as handle:  # refuses a file whose size is not what its header adds up to
            for name in handle.keys():  # noqa: SIM118  (it is not a mapping)
                view = handle.get_slice(name)
                yield name, StoredTensor(file, view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise SmoothQuantError(f"{file} is truncated or not a safetensors file ({error}); {COPY_AGAIN}") from error


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    if not path.is_file():
        raise SmoothQuantError(f"{path} does not exist; {advice}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SmoothQuantError(f"{path} cannot be read as JSON ({error}); {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise SmoothQuantError(f"{path} holds {type(value).__name__}, expected a JSON object; {COPY_AGAIN}")
    return value
