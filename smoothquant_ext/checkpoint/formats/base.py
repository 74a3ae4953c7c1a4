"""The checkpoint formats that are written: how a ``quantization_config`` names our schemes, and a layer its tensors.

compressed-tensors is described by its ``QuantizationConfig`` (config_groups, targets, ignore); LMDeploy by
``quant_method: smooth_quant`` with a ``quant_dtype``. Reading, theirs and other people's, is in ``layouts``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme


@dataclass(frozen=True)
class Format:
    """How one format spells a layer: the names of its scale tensors, next to ``weight`` and ``bias``.

    Attributes:
        name: what ``save(format=...)`` calls it.
        quant_method: what its ``quantization_config`` calls it.
        weight_scale: suffix of the weight's scale.
        input_scale: suffix of the static activation scale, ``None`` where the format has no static activations.
        smooth: suffix of the explicit smoothing scale, ``None`` where the format has none.
        dtypes: the 8-bit dtypes it can store.
    """

    name: str
    quant_method: str
    weight_scale: str
    input_scale: str | None
    smooth: str | None
    dtypes: tuple[torch.dtype, ...]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            Format(
                "compressed-tensors",
                "compressed-tensors",
                "weight_scale",
                "input_scale",
                None,
                (torch.int8, torch.float8_e4m3fn),
            ),
            # compressed-tensors and one tensor more, described so that others refuse it (see SMOOTHED).
            Format(
                "smoothquant-ext",
                "compressed-tensors",
                "weight_scale",
                "input_scale",
                "smooth",
                (torch.int8, torch.float8_e4m3fn),
            ),
            Format(
                "lmdeploy",
                "smooth_quant",
                "scale",
                None,
                None,
                (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2),
            ),
        )
    }
)

# compressed-tensors' `type` and the format that goes with it, for each dtype it has.
CT_TYPES = {torch.int8: ("int", "int-quantized"), torch.float8_e4m3fn: ("float", "float-quantized")}
# Without the scale of explicit smoothing a model talks nonsense, so nobody may load it who does not know that tensor:
# compressed-tensors, and transformers with it, stops at a status that it has never heard of, vLLM at such a format.
SMOOTHED = "smoothed"


def choose_format(name: str | None, schemes: Sequence[Scheme], explicit: bool = False) -> Format:
    """The format to write, checked against the schemes of the model and whether it has explicit smoothing.

    ``None`` chooses compressed-tensors, where that can store the model.

    Raises:
        SmoothQuantError: unknown format, or one that cannot store one of the schemes.
    """
    e5m2 = any(scheme.dtype == torch.float8_e5m2 for scheme in schemes)
    if name is None:
        name = "lmdeploy" if e5m2 else "smoothquant-ext" if explicit else "compressed-tensors"
    if name not in FORMATS:
        raise SmoothQuantError(f"unknown format {name!r}, expected one of {', '.join(FORMATS)}")
    fmt = FORMATS[name]
    if explicit and fmt.smooth is None:
        raise SmoothQuantError(
            f"format {name!r} has no place for explicit smoothing scales; use format 'smoothquant-ext', or quantize "
            "without explicit smoothing"
        )
    for scheme in schemes:
        if scheme.dtype not in fmt.dtypes:
            raise SmoothQuantError(
                f"format {name!r} cannot store scheme {scheme.name!r} ({short_name(scheme.dtype)}); "
                "use format 'lmdeploy'"
            )
        if scheme.is_static and fmt.input_scale is None:
            raise SmoothQuantError(
                f"format {name!r} has no static activation scales, which scheme {scheme.name!r} needs; "
                "use format 'compressed-tensors' or a dynamic scheme"
            )
        if not scheme.symmetric and fmt.name == "lmdeploy":
            raise SmoothQuantError(
                f"format {name!r} has symmetric activations only, and scheme {scheme.name!r} has not; "
                "use format 'compressed-tensors'"
            )
    if fmt.name == "lmdeploy" and len({scheme.dtype for scheme in schemes}) > 1:
        raise SmoothQuantError("format 'lmdeploy' has one quant_dtype for all layers; use format 'compressed-tensors'")
    return fmt


def quantization_config(fmt: Format, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        fmt: from ``choose_format``.
        schemes: scheme of each quantized layer, by its name in the checkpoint.
        ignore: names of the linear layers that stay in floating point.
    """
    if fmt.name == "lmdeploy":
        dtype = next(iter(schemes.values())).dtype
        return {
            "quant_method": fmt.quant_method,
            "quant_dtype": short_name(dtype),
            "modules_to_not_convert": list(ignore),
        }
    names_by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names_by_scheme.setdefault(scheme, []).append(name)
    formats = [CT_TYPES[scheme.dtype][1] for scheme in names_by_scheme]
    if fmt.smooth is not None:
        formats = [f"{name}-{SMOOTHED}" for name in formats]
    mixed = len(set(formats)) > 1
    groups = {}
    for index, (scheme, names) in enumerate(names_by_scheme.items()):
        group = _ct_group(scheme, ["Linear"] if len(names_by_scheme) == 1 else names)
        groups[f"group_{index}"] = group | {"format": formats[index]} if mixed else group
    return {
        "quant_method": fmt.quant_method,
        "format": "mixed-precision" if mixed else formats[0],
        "quantization_status": "compressed" if fmt.smooth is None else SMOOTHED,
        "ignore": list(ignore),
        "config_groups": groups,
    }


def _ct_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": CT_TYPES[scheme.dtype][0]}
    return {
        "targets": targets,
        "weights": {**common, "symmetric": True, "strategy": scheme.weight, "dynamic": False},
        "input_activations": {
            **common,
            "symmetric": scheme.symmetric,
            "strategy": scheme.activation,
            "dynamic": not scheme.is_static,
        },
    }


def short_name(dtype: torch.dtype) -> str:
    """``int8``, ``float8_e4m3fn`` or ``float8_e5m2``."""
    return str(dtype).removeprefix("torch.")
