"""The list of checkpoint formats, and the choice among them.

Reading takes any of them. What holds something other than W8A8 gets a sentence that says what it is, and who reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme
from .ascend import Ascend
from .base import CONVERT_AGAIN, FloatWeights, Format, QuantizationMap
from .compressed_tensors import CompressedTensors, Smoothed
from .fp8 import FbgemmFp8, Fp8, ModelOpt
from .lmdeploy import LMDeploy
from .quark import Quark
from .refused import refusal
from .sglang import SGLang

FORMATS: tuple[Format, ...] = (
    CompressedTensors(),
    LMDeploy(),
    Smoothed(),
    Fp8(),
    FbgemmFp8(),
    ModelOpt(),
    Quark(),
    SGLang("w8a8_int8", torch.int8),
    SGLang("w8a8_fp8", torch.float8_e4m3fn),
    Ascend(),
)
"""Every format. Of those that can store a model, ``save`` takes the first; of those that recognize a configuration, the
last reads it, so a special case stands behind the general one."""


def quant_methods() -> list[str]:
    """The values of ``quant_method`` of checkpoints that may be W8A8."""
    return list(dict.fromkeys(fmt.quant_method for fmt in FORMATS))


def config_files() -> list[str]:
    """The names of files that may say how a model is quantized where its config.json does not."""
    return [fmt.config_file for fmt in FORMATS if fmt.config_file is not None]


def written_formats() -> dict[str, Format]:
    """The formats that ``save`` writes, by name."""
    return {fmt.name: fmt for fmt in FORMATS if fmt.dtypes}


def parse_quantization_config(config: object, where: str, as_w8a8: bool = False) -> QuantizationMap:
    """Reads the ``quantization_config`` of a config.json.

    Args:
        config: its value, or the content of a format's ``config_file``.
        where: the file's name, for messages.
        as_w8a8: whether 8-bit weights whose activations are in floating point are read too, to run them as W8A8.

    Raises:
        FloatWeights: it quantizes no weights.
        SmoothQuantError: it describes something other than W8A8 with scales per channel or tensor, which it names.
    """
    if not isinstance(config, Mapping):
        raise SmoothQuantError(f"{where}: quantization_config is {config!r}, expected an object; {CONVERT_AGAIN}")
    if not config:
        raise FloatWeights(f"{where}: quantization_config is empty, so the model is in floating point")
    fmt = _recognized(config)
    if fmt is None:
        raise refusal(config, where)
    try:
        quantization = fmt.parse(config, where)
    except SmoothQuantError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value of another type than its writers use
        raise SmoothQuantError(
            f"{where}: the quantization_config of {fmt.quant_method} cannot be read ({error}); {CONVERT_AGAIN}"
        ) from error
    if not quantization.weight_only:
        return quantization
    if not as_w8a8:
        raise SmoothQuantError(
            f"{where}: only the weights have 8 bits (W8A16), which is read by {quantization.weight_only}; to quantize "
            f"the activations too, run 'smoothquant convert --as-w8a8', or {CONVERT_AGAIN}"
        )
    note = "the activations are quantized to 8 bits too, a scale per token, though the checkpoint does not ask for it"
    return replace(quantization, notes=(*quantization.notes, note))


def why_float(config: object, where: str) -> str:
    """Why a model with this ``quantization_config`` is one in floating point, a sentence; ``""`` if it is not."""
    try:
        parse_quantization_config(config, where)
    except FloatWeights as reason:
        return str(reason)
    except SmoothQuantError:
        pass
    return ""


def file_with_details(config: object) -> str | None:
    """The name of the file that holds what a ``quantization_config`` only announces, ``None`` for most formats."""
    fmt = _recognized(config) if isinstance(config, Mapping) else None
    return fmt.config_file if fmt is not None and fmt.config_file_goes_first else None


def _recognized(config: Mapping[str, Any]) -> Format | None:
    return next((fmt for fmt in reversed(FORMATS) if fmt.recognizes(config)), None)


def choose_format(
    name: str | None,
    schemes: Sequence[Scheme],
    explicit: bool = False,
    rotated: Collection[str] = (),
    shared: bool = False,
) -> Format:
    """The format to write a model in, checked to be able to store it.

    Args:
        name: of the format; ``None`` chooses the first that can store the model, and that no reader misreads.
        schemes: the schemes of the model's layers.
        explicit: whether a layer has an explicit smoothing scale.
        rotated: what is rotated at run time, of ``base.LAYERS`` and ``base.EXPERTS``.
        shared: whether the token embedding reads the weight of an 8-bit output embedding.

    Raises:
        SmoothQuantError: the format is unknown, or cannot store the model.
    """
    written = written_formats()
    if name is not None and name not in written:
        raise SmoothQuantError(f"unknown format {name!r}, expected one of {', '.join(written)}")
    reasons = {fmt.name: fmt.cannot_store(schemes, explicit, rotated, shared) for fmt in written.values()}
    able = [fmt for fmt in written.values() if not reasons[fmt.name]]
    best = next((fmt for fmt in able if not (rotated and fmt.rotations_ignored_by)), None)
    if name is None and best:
        return best
    if name is not None and not reasons[name]:
        return written[name]
    refused = [name] if name is not None else list(written)
    problem = ", ".join(f"format {each!r} {reasons[each]}" for each in refused)
    advice = f"use format {best.name!r} or another recipe" if best else "use another recipe"
    raise SmoothQuantError(f"{problem}; {advice}")
