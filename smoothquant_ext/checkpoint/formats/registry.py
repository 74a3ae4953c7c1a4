"""What the ``quantization_config`` of a checkpoint says, whoever wrote it: which layers are W8A8, and how.

Read are compressed-tensors (llm-compressor), LMDeploy's smooth_quant, and the FP8 checkpoints of FBGEMM, of vLLM and
transformers (``fp8``), and of NVIDIA ModelOpt. What holds something else than W8A8 gets a sentence that says what it
is, and who reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ...errors import SmoothQuantError
from ...scheme import Scheme, scheme_of
from .base import CT_TYPES, FORMATS, SMOOTHED, Format, short_name

CONVERT_AGAIN = "quantize the original model with smoothquant-ext instead"

# Formats that keep one 8-bit number per weight under the name `weight`; `naive-quantized` is an old name for both.
_CT_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_CT_DTYPES = {type_name: dtype for dtype, (type_name, _) in CT_TYPES.items()}
# `frozen` is what old versions called it. Whether the weights really have 8 bits is seen in the files.
_CT_STATUSES = ("compressed", "frozen", SMOOTHED)
# Extensions that change what the tensors mean; empty or absent in a plain W8A8 checkpoint.
_CT_EXTENSIONS = ("transform_config", "moe_sparsity_config")

# Formats of others that are only read. The files say whether a scale is per channel, so the scheme here is a start.
_FP8 = (torch.float8_e4m3fn,)
_VLLM_FP8 = Format("fp8", "fp8", "weight_scale", "input_scale", None, _FP8)
_TRANSFORMERS_FP8 = Format("fp8", "fp8", "weight_scale_inv", "activation_scale", None, _FP8)
_FBGEMM = Format("fbgemm_fp8", "fbgemm_fp8", "weight_scale", None, None, _FP8)
_MODELOPT = Format("modelopt", "modelopt", "weight_scale", "input_scale", None, _FP8)

# What else is about: what it is, and who reads it.
_NOT_W8A8: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "gptq": ("GPTQ: weights only, in 4 or 8 bits", "vLLM and transformers"),
        "awq": ("AWQ: weights only, in 4 bits", "vLLM and transformers"),
        "auto-round": ("AutoRound: weights only", "vLLM and transformers"),
        "bitsandbytes": ("bitsandbytes: weights only, or split by outliers", "transformers"),
        "eetq": ("EETQ: weights only, in 8 bits", "transformers"),
        "hqq": ("HQQ: weights only", "transformers"),
        "quanto": ("Quanto: weights only", "transformers"),
        "aqlm": ("AQLM: weights only, in 2 bits", "transformers"),
        "bitnet": ("BitNet: ternary weights", "transformers"),
        "gguf": ("GGUF: weights only", "llama.cpp; name the .gguf file itself and it is dequantized"),
        "mxfp4": ("MXFP4: 4-bit weights in blocks", "vLLM and transformers"),
        "mxfp8": ("MXFP8: scaled in blocks of 32", "vLLM"),
        "nvfp4": ("NVFP4: 4-bit weights in blocks", "vLLM"),
        "torchao": ("torchao's own kind of tensors", "transformers, with torchao"),
        "quark": ("AMD Quark's own format", "vLLM, and transformers with amd-quark"),
    }
)


@dataclass(frozen=True)
class Layout:
    """What a ``quantization_config`` says: the format, and which layers have which scheme.

    Attributes:
        fmt: the format.
        groups: (targets, scheme) in order; a target is a class name, a module name, or ``re:`` and a regular
            expression, as in compressed-tensors.
        ignore: targets that stay in floating point whatever ``groups`` says.
        complete: true if every linear layer that is targeted and not ignored must be quantized, and the granularity
            of the scales is as ``groups`` says; else the files decide both.
        notes: what is read differently from what the configuration asks for, a sentence each.
    """

    fmt: Format
    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]
    complete: bool
    notes: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether the linear layer ``name`` is said to stay in floating point."""
        return any(_targets(target, name) for target in self.ignore)

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the linear layer ``name``, ``None`` if it is ignored or not targeted."""
        if self.ignores(name):
            return None
        return next((scheme for targets, scheme in self.groups if any(_targets(t, name) for t in targets)), None)

    def spelled_as(self, tensors: Collection[str]) -> Layout:
        """The same with the format whose names ``tensors`` has: transformers and vLLM both call theirs ``fp8``."""
        other = f".{_TRANSFORMERS_FP8.weight_scale}"
        is_other = self.fmt is _VLLM_FP8 and any(name.endswith(other) for name in tensors)
        return replace(self, fmt=_TRANSFORMERS_FP8) if is_other else self


def parse_quantization_config(config: object, where: str) -> Layout:
    """Reads the ``quantization_config`` of a config.json.

    Args:
        config: the value found there, or ModelOpt's hf_quant_config.json.
        where: the file's name, for messages.

    Raises:
        SmoothQuantError: it describes something other than W8A8 with scales per channel or tensor, which it names.
    """
    if not isinstance(config, Mapping):
        raise SmoothQuantError(f"{where}: quantization_config is {config!r}, expected an object; {CONVERT_AGAIN}")
    method = config.get("quant_method")
    if method is None and ("quant_algo" in config or "quantization" in config):
        method = "modelopt"
    if method in _PARSERS:
        return _PARSERS[method](config, where)
    what, reader = _NOT_W8A8.get(str(method).lower(), ("", ""))
    found = f"{what}, read by {reader}" if what else repr(method)
    raise SmoothQuantError(f"{where}: the model is quantized with {found}, which is not W8A8; {CONVERT_AGAIN}")


def _refuse(where: str, what: str, reader: str) -> SmoothQuantError:
    return SmoothQuantError(f"{where} has {what}, which is not W8A8 but is read by {reader}; {CONVERT_AGAIN}")


# --- FP8 in other people's formats ----------------------------------------------------------------------------------


def _parse_lmdeploy(config: Mapping[str, Any], where: str) -> Layout:
    fmt = FORMATS["lmdeploy"]
    name = config.get("quant_dtype", "int8")  # checkpoints older than the key are int8
    name = {"fp8": "float8_e4m3fn"}.get(str(name), name)  # its command line's short name
    dtype = next((dtype for dtype in fmt.dtypes if short_name(dtype) == name), None)
    if dtype is None:
        raise SmoothQuantError(f"{where}: quant_dtype {name!r} is not an 8-bit dtype LMDeploy has; {CONVERT_AGAIN}")
    ignore = _patterns(config.get("modules_to_not_convert"), f"{where}: modules_to_not_convert")
    return Layout(fmt, _everywhere(scheme_of(dtype, "channel", "token")), ignore, complete=False)


def _parse_fbgemm(config: Mapping[str, Any], where: str) -> Layout:
    # Its activation_scale_ub cuts off a token's largest values. A scale per token that is not cut is more exact.
    return Layout(_FBGEMM, _everywhere(scheme_of(torch.float8_e4m3fn, "channel", "token")), (), complete=False)


def _parse_fp8(config: Mapping[str, Any], where: str) -> Layout:
    if block := config.get("weight_block_size"):
        raise _refuse(f"{where}: it", f"FP8 weights scaled in blocks of {block}", "vLLM, SGLang and transformers")
    activation = config.get("activation_scheme", "dynamic")
    if activation not in ("static", "dynamic"):
        raise SmoothQuantError(f"{where}: activation_scheme is {activation!r}, expected static or dynamic")
    scheme = scheme_of(torch.float8_e4m3fn, "tensor", "tensor" if activation == "static" else "token")
    return Layout(_VLLM_FP8, _everywhere(scheme), (), complete=False, notes=_cache_note(config.get("kv_cache_scheme")))


def _parse_modelopt(config: Mapping[str, Any], where: str) -> Layout:
    config = config.get("quantization") or config
    algorithm = str(config.get("quant_algo")).upper()
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        raise SmoothQuantError(
            f"{where}: ModelOpt's INT8 SmoothQuant has tensors of its own, which TensorRT-LLM reads; {CONVERT_AGAIN}"
        )
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        raise _refuse(f"{where}: quant_algo {algorithm!r}", "blocks, other bits than 8, or no 8-bit weights", "vLLM")
    static = algorithm == "FP8"
    scheme = scheme_of(torch.float8_e4m3fn, *(("tensor", "tensor") if static else ("channel", "token")))
    cache = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    return Layout(_MODELOPT, _everywhere(scheme), (), complete=False, notes=_cache_note(cache))


def _everywhere(scheme: Scheme) -> tuple[tuple[tuple[str, ...], Scheme], ...]:
    return ((("Linear",), scheme),)


def _cache_note(scheme: object) -> tuple[str, ...]:
    return ("the cache of keys and values is kept in floating point, not in 8 bits",) if scheme else ()


# --- compressed-tensors ---------------------------------------------------------------------------------------------


def _parse_compressed_tensors(config: Mapping[str, Any], where: str) -> Layout:
    for key in _CT_EXTENSIONS:
        if config.get(key):
            raise SmoothQuantError(f"{where}: {key} is set, which is not supported; {CONVERT_AGAIN}")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise SmoothQuantError(f"{where}: the weights are stored as {sparsity!r}, not dense; {CONVERT_AGAIN}")
    status = config.get("quantization_status", "compressed")
    fmt = FORMATS["smoothquant-ext" if status == SMOOTHED else "compressed-tensors"]
    if status not in _CT_STATUSES:
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
    notes = _cache_note(config.get("kv_cache_scheme"))
    return Layout(fmt, tuple(groups), ignore, complete=True, notes=notes)


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
    dtype = _CT_DTYPES[weights.get("type", "int")]
    if weights.get("type", "int") != activations.get("type", "int"):
        raise SmoothQuantError(f"{where} mixes int and float in one layer; {CONVERT_AGAIN}")
    symmetric = activations.get("symmetric", True)
    if not weights.get("symmetric", True) or (not symmetric and dtype != torch.int8):
        part = "weights" if symmetric or dtype == torch.int8 else "float input_activations"
        raise SmoothQuantError(f"{where} has asymmetric {part}, expected symmetric ones; {CONVERT_AGAIN}")
    dynamic = activations.get("dynamic", False)
    strategies = weights.get("strategy") or "tensor", activations.get("strategy") or ("token" if dynamic else "tensor")
    if "block" in strategies or "group" in strategies:
        raise _refuse(where, "weights or activations scaled in blocks", "vLLM")
    # One dynamic scale for all tokens of a batch is a makeshift for one a token, which is more exact.
    activation = {("token", True): "token", ("tensor", True): "token", ("tensor", False): "tensor"}.get(
        (strategies[1], dynamic)
    )
    if weights.get("dynamic", False) or strategies[0] not in ("channel", "tensor") or activation is None:
        kind = "dynamic" if dynamic else "static"
        raise SmoothQuantError(
            f"{where} has weight scales per {strategies[0]} and {kind} activation scales per {strategies[1]}, "
            f"expected per channel or tensor, and dynamic per token or static per tensor; {CONVERT_AGAIN}"
        )
    scheme = scheme_of(dtype, strategies[0], activation)
    return scheme if symmetric else replace(scheme, name=f"{scheme.name}-asymmetric", symmetric=False)


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


_PARSERS: Mapping[object, Callable[[Mapping[str, Any], str], Layout]] = MappingProxyType(
    {
        "compressed-tensors": _parse_compressed_tensors,
        "smooth_quant": _parse_lmdeploy,
        "fbgemm_fp8": _parse_fbgemm,
        "fp8": _parse_fp8,
        "modelopt": _parse_modelopt,
    }
)
METHODS: tuple[str, ...] = tuple(str(method) for method in _PARSERS)
"""The values of ``quant_method`` under which W8A8 is found."""
