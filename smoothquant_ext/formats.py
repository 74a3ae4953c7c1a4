"""The checkpoint formats: how a ``quantization_config`` names our schemes, and what each tensor of a layer is called.

compressed-tensors is described by its ``QuantizationConfig`` (config_groups, targets, ignore); LMDeploy by
``quant_method: smooth_quant`` with a ``quant_dtype``. Both are read whoever wrote them, as far as they hold W8A8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from .errors import SmoothQuantError
from .scheme import Scheme, scheme_of

CONVERT_AGAIN = "quantize the original model with smoothquant-ext instead"


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
_CT_TYPES = {torch.int8: ("int", "int-quantized"), torch.float8_e4m3fn: ("float", "float-quantized")}
_CT_DTYPES = {type_name: dtype for dtype, (type_name, _) in _CT_TYPES.items()}
# Formats that keep one 8-bit number per weight under the name `weight`; `naive-quantized` is an old name for both.
_CT_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# Without the scale of explicit smoothing a model talks nonsense, so nobody may load it who does not know that tensor:
# compressed-tensors, and transformers with it, stops at a status that it has never heard of, vLLM at such a format.
SMOOTHED = "smoothed"
# Extensions of the configuration that change what the tensors mean; empty or absent in a plain W8A8 checkpoint.
_CT_EXTENSIONS = ("kv_cache_scheme", "transform_config", "moe_sparsity_config")


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
                f"format {name!r} cannot store scheme {scheme.name!r} ({_short(scheme.dtype)}); use format 'lmdeploy'"
            )
        if scheme.is_static and fmt.input_scale is None:
            raise SmoothQuantError(
                f"format {name!r} has no static activation scales, which scheme {scheme.name!r} needs; "
                "use format 'compressed-tensors' or a dynamic scheme"
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
            "quant_dtype": _short(dtype),
            "modules_to_not_convert": list(ignore),
        }
    names_by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        names_by_scheme.setdefault(scheme, []).append(name)
    formats = [_CT_TYPES[scheme.dtype][1] for scheme in names_by_scheme]
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
    common = {"num_bits": 8, "type": _CT_TYPES[scheme.dtype][0], "symmetric": True}
    return {
        "targets": targets,
        "weights": {**common, "strategy": scheme.weight, "dynamic": False},
        "input_activations": {**common, "strategy": scheme.activation, "dynamic": not scheme.is_static},
    }


@dataclass(frozen=True)
class Layout:
    """What a ``quantization_config`` says: the format, and which layers have which scheme.

    Attributes:
        fmt: the format.
        groups: (targets, scheme) in order; a target is a class name, a module name, or ``re:`` and a regular
            expression, as in compressed-tensors.
        ignore: targets that stay in floating point whatever ``groups`` says.
        complete: true if every linear layer that is targeted and not ignored must be quantized.
    """

    fmt: Format
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    complete: bool

    def ignores(self, name: str) -> bool:
        """Whether the linear layer ``name`` is said to stay in floating point."""
        return any(_targets(target, name) for target in self.ignore)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the linear layer ``name``, ``None`` if it is ignored or not targeted."""
        if self.ignores(name):
            return None
        return next((scheme for targets, scheme in self.groups if any(_targets(t, name) for t in targets)), None)


def parse_quantization_config(config: object, where: str) -> Layout:
    """Reads the ``quantization_config`` of a config.json.

    Args:
        config: the value found there.
        where: the file's name, for messages.

    Raises:
        SmoothQuantError: it describes something other than W8A8 of the kinds in ``SCHEMES``, which it names.
    """
    if not isinstance(config, Mapping):
        raise SmoothQuantError(f"{where}: quantization_config is {config!r}, expected an object; {CONVERT_AGAIN}")
    method = config.get("quant_method")
    if method == "smooth_quant":
        return _parse_lmdeploy(config, where)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(config, where)
    raise SmoothQuantError(f"{where}: the model is quantized with {method!r}, which is not W8A8; {CONVERT_AGAIN}")


def _parse_lmdeploy(config: Mapping[str, Any], where: str) -> Layout:
    fmt = FORMATS["lmdeploy"]
    name = config.get("quant_dtype", "int8")  # checkpoints older than the key are int8
    dtype = next((dtype for dtype in fmt.dtypes if _short(dtype) == name), None)
    if dtype is None:
        raise SmoothQuantError(f"{where}: quant_dtype {name!r} is not an 8-bit dtype LMDeploy has; {CONVERT_AGAIN}")
    ignore = _patterns(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return Layout(fmt, ((("Linear",), scheme_of(dtype, "channel", "token")),), ignore, complete=False)


def _parse_compressed_tensors(config: Mapping[str, Any], where: str) -> Layout:
    for key in _CT_EXTENSIONS:
        if config.get(key):
            raise SmoothQuantError(f"{where}: {key} is set, which is not supported; {CONVERT_AGAIN}")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise SmoothQuantError(f"{where}: the weights are stored as {sparsity!r}, not dense; {CONVERT_AGAIN}")
    status = config.get("quantization_status", "compressed")
    fmt = FORMATS["smoothquant-ext" if status == SMOOTHED else "compressed-tensors"]
    if status not in ("compressed", SMOOTHED):
        raise SmoothQuantError(
            f"{where}: quantization_status is {status!r}, so the weights are not stored in 8 bits; {CONVERT_AGAIN}"
        )
    raw_groups = config.get("config_groups")
    if not isinstance(raw_groups, Mapping) or not raw_groups:
        raise SmoothQuantError(f"{where}: quantization_config has no config_groups; {CONVERT_AGAIN}")
    groups = []
    for name, group in raw_groups.items():
        if not isinstance(group, Mapping):
            raise SmoothQuantError(f"{where}: {name} is {group!r}, expected targets and weights; {CONVERT_AGAIN}")
        stored = group.get("format") or config.get("format")
        if not isinstance(stored, str) or stored.removesuffix(f"-{SMOOTHED}") not in _CT_FORMATS:
            raise SmoothQuantError(f"{where}: {name} is stored as {stored!r}, which is not W8A8; {CONVERT_AGAIN}")
        targets = _patterns(group.get("targets"), f"{where}: the targets of {name}")
        groups.append((targets, _parse_ct_group(group, f"{where}: {name}")))
    ignore = _patterns(config.get("ignore"), f"{where}: ignore")
    return Layout(fmt, tuple(groups), ignore, complete=True)


def _parse_ct_group(group: Mapping[str, Any], where: str) -> Scheme:
    weights, activations = group.get("weights"), group.get("input_activations")
    if not weights or not activations or group.get("output_activations"):
        parts = [part for part in ("weights", "input_activations", "output_activations") if group.get(part)]
        raise SmoothQuantError(
            f"{where} quantizes {' and '.join(parts) or 'nothing'}, expected weights and input_activations; "
            f"{CONVERT_AGAIN}"
        )
    for part, arguments in (("weights", weights), ("input_activations", activations)):
        if not isinstance(arguments, Mapping):
            raise SmoothQuantError(f"{where} has {part} {arguments!r}, expected an object; {CONVERT_AGAIN}")
        type_name, bits = arguments.get("type", "int"), arguments.get("num_bits", 8)
        if type_name not in _CT_DTYPES or bits != 8:
            raise SmoothQuantError(f"{where} has {bits}-bit {type_name} {part}, expected 8 bits; {CONVERT_AGAIN}")
        if not arguments.get("symmetric", True):
            raise SmoothQuantError(f"{where} has asymmetric {part}, expected symmetric ones; {CONVERT_AGAIN}")
    if weights.get("type", "int") != activations.get("type", "int"):
        raise SmoothQuantError(f"{where} mixes int and float in one layer; {CONVERT_AGAIN}")
    strategy, dynamic = activations.get("strategy"), activations.get("dynamic", False)
    activation = {("token", True): "token", ("tensor", False): "tensor"}.get((strategy, dynamic))
    if weights.get("dynamic", False) or weights.get("strategy") not in ("channel", "tensor") or activation is None:
        kind = "dynamic" if dynamic else "static"
        raise SmoothQuantError(
            f"{where} has weight scales per {weights.get('strategy')} and {kind} activation scales per {strategy}, "
            f"expected per channel or tensor, and dynamic per token or static per tensor; {CONVERT_AGAIN}"
        )
    return scheme_of(_CT_DTYPES[weights.get("type", "int")], weights["strategy"], activation)


def _patterns(value: object, where: str) -> tuple[str, ...]:
    value = [] if value is None else value
    try:
        if isinstance(value, list) and all(isinstance(pattern, str) for pattern in value):
            for pattern in value:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            return tuple(value)
    except re.error:
        pass
    raise SmoothQuantError(f"{where} is {value!r}, expected a list of names or 're:' patterns; {CONVERT_AGAIN}")


def _targets(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in ("Linear", name)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
