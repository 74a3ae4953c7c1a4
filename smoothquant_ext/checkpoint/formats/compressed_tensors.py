"""compressed-tensors, the format of llm-compressor, and with one tensor more the format of explicit smoothing.

    {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
     "ignore": ["lm_head"],
     "config_groups": {"group_0": {"targets": ["Linear"], "weights": {...}, "input_activations": {...}}}}

A layer has ``weight`` [N, K], ``weight_scale`` fp32 [N, 1] or [1], with static activations ``input_scale`` [1], and
where these are asymmetric ``input_zero_point`` [1]. What is rotated at run time is in ``transforms``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import SmoothQuantError
from ...scheme import Scheme, scheme_of
from .base import (
    CONVERT_AGAIN,
    EXPERTS,
    LAYERS,
    FloatWeights,
    Format,
    NotExecutable,
    QuantizationMap,
    TensorNames,
    Transform,
    cache_notes,
    not_w8a8,
    parse_targets,
)
from .transforms import CONFIG_KEY, parse_transforms, stored_matrices, transform_config

# The `type` of each dtype, and the `format` that goes with it.
TYPES = {torch.int8: ("int", "int-quantized"), torch.float8_e4m3fn: ("float", "float-quantized")}
DTYPES = {type_name: dtype for dtype, (type_name, _) in TYPES.items()}
# Formats that keep one 8-bit number per weight under the name `weight`; `naive-quantized` is an old name for both.
READABLE = ("int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# What weights without quantized activations are run with if that is asked for: the default of compressed-tensors.
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
# Who runs 8-bit weights with activations in floating point (W8A16), of those that read them stored one by one.
WEIGHT_ONLY_READERS = {torch.int8: "transformers", torch.float8_e4m3fn: "vLLM, SGLang and transformers"}
BLOCK_READERS = {torch.int8: "transformers", torch.float8_e4m3fn: "vLLM, SGLang and transformers"}
# Extensions that change what the tensors mean; empty or absent in a plain W8A8 checkpoint.
EXTENSIONS = ("moe_sparsity_config",)


class CompressedTensors(Format):
    """compressed-tensors as other tools write and read it.

    Attributes:
        statuses: the values of ``quantization_status`` under which weights have 8 bits; the first is written.
            ``frozen`` is what old versions called it. The files show whether the weights really have 8 bits.
        suffix: follows every ``format``.
    """

    name = quant_method = "compressed-tensors"
    tensors = TensorNames(
        input_scale="input_scale", input_zero_point="input_zero_point", weight_zero_point="weight_zero_point"
    )
    dtypes = tuple(TYPES)
    # vLLM multiplies the inputs of linear layers; of experts' it knows nothing.
    rotates: tuple[str, ...] = (LAYERS,)
    rotations_ignored_by = "SGLang, and transformers without smoothquant-ext"
    statuses: tuple[str, ...] = ("compressed", "frozen")
    suffix = ""
    read_by = "vLLM, SGLang and transformers"
    how_to_run = (
        "It is stored as compressed-tensors, so vLLM (`vllm serve {name}`) and SGLang run it in 8 bits too. "
        "transformers\nwithout smoothquant-ext needs the package `compressed-tensors` and dequantizes it; transformers "
        "5.24 keeps FP8 on some\nGPUs if asked to by `CompressedTensorsConfig(use_optimized_inference=True)`."
    )
    how_to_run_rotated = (
        "It is stored as compressed-tensors, whose `transform_config` says what is rotated at run time. vLLM\n"
        f"(`vllm serve {{name}}`) does that on an NVIDIA GPU. {rotations_ignored_by}, do not\n"
        "read `transform_config`: their output is nonsense."
    )

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        # Its own reader takes a configuration without quant_method too.
        unnamed = config.get("quant_method") is None and "config_groups" in config
        return unnamed or super().recognizes(config)

    def parse(self, config: Mapping[str, Any], where: str) -> QuantizationMap:
        for key in EXTENSIONS:
            if config.get(key):
                raise SmoothQuantError(f"{where}: {key} is set, which is not supported; {CONVERT_AGAIN}")
        sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise SmoothQuantError(f"{where}: the weights are stored as {sparsity!r}, not dense; {CONVERT_AGAIN}")
        raw_groups = config.get("config_groups") or {}
        cache = cache_notes(config.get("kv_cache_scheme"))
        if not isinstance(raw_groups, Mapping) or not (raw_groups or cache or config.get(CONFIG_KEY)):
            raise SmoothQuantError(f"{where}: quantization_config has no config_groups; {CONVERT_AGAIN}")
        groups: list[_Group] = []
        for name, raw in raw_groups.items():
            if not isinstance(raw, Mapping):
                raise SmoothQuantError(f"{where}: {name} is {raw!r}, expected targets and weights; {CONVERT_AGAIN}")
            stored = raw.get("format") or config.get("format")
            if raw.get("weights") and (not isinstance(stored, str) or stored.removesuffix(self.suffix) not in READABLE):
                raise _not_readable(raw, stored, f"{where}: {name}")
            targets = parse_targets(raw.get("targets"), f"{where}: the targets of {name}")
            groups.append(_parse_group(name, raw, targets, where))
        notes = tuple(dict.fromkeys([*cache, *(group.note for group in groups if group.note)]))
        if all(group.scheme is None for group in groups):
            if _transforms(config, where):
                raise NotExecutable(
                    f"{where}: inputs are rotated at run time and no weights are quantized, which is not supported; "
                    f"{CONVERT_AGAIN}"
                )
            said = "; ".join(notes) or "rotations are in the weights"
            raise FloatWeights(f"{where}: no weights are quantized, and {said}")
        status = config.get("quantization_status", "compressed")
        if status not in self.statuses:
            raise SmoothQuantError(
                f"{where}: quantization_status is {status!r}, so the weights are not stored in 8 bits; {CONVERT_AGAIN}"
            )
        ignore = parse_targets(config.get("ignore"), f"{where}: ignore")
        schemes = tuple((group.targets, group.scheme) for group in groups)
        weight_only = next((group.weight_only for group in groups if group.weight_only), "")
        return QuantizationMap(
            self, schemes, ignore, True, notes=notes, weight_only=weight_only, transforms=_transforms(config, where)
        )

    def quantization_config(self, schemes: Mapping[str, Scheme], ignore: Sequence[str]) -> dict[str, Any]:
        names_by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            names_by_scheme.setdefault(scheme, []).append(name)
        formats = [TYPES[scheme.dtype][1] + self.suffix for scheme in names_by_scheme]
        mixed = len(set(formats)) > 1
        groups = {}
        for index, (scheme, names) in enumerate(names_by_scheme.items()):
            group = _write_group(scheme, ["Linear"] if len(names_by_scheme) == 1 else names)
            groups[f"group_{index}"] = group | {"format": formats[index]} if mixed else group
        return {
            "quant_method": self.quant_method,
            "format": "mixed-precision" if mixed else formats[0],
            "quantization_status": self.statuses[0],
            "ignore": list(ignore),
            "config_groups": groups,
        }

    def rotation_config(self, blocks: Mapping[str, int], ignore: Sequence[str]) -> dict[str, Any]:
        transforms = transform_config(blocks, ignore)
        return {CONFIG_KEY: transforms} if transforms else {}

    def matrices(self, blocks: Mapping[str, int]) -> dict[str, Tensor]:
        return stored_matrices(blocks)


class Smoothed(CompressedTensors):
    """compressed-tensors and what other programs do not do at run time: the explicit smoothing scale, ``smooth`` fp32
    [K], rotations, and a token embedding that reads the 8-bit output embedding. In place of a weight that
    embedding has ``factor`` [1], what it multiplies rows by.

    Without them the outputs would be wrong, so no other program may load the checkpoint: compressed-tensors, and
    transformers with it, stops at an unknown status, vLLM at an unknown format.
    """

    name = "smoothquant-ext"
    tensors = replace(CompressedTensors.tensors, smooth="smooth")
    rotates = (LAYERS, EXPERTS)
    shares_head = True
    rotations_ignored_by = ""
    statuses = ("smoothed",)
    suffix = "-smoothed"
    read_by = "smoothquant-ext alone, for --explicit, inputs rotated at run time and --head 8bit"
    how_to_run = (
        "Some of its inputs are smoothed at run time, by a tensor that only smoothquant-ext reads. "
        "Other engines refuse it."
    )
    how_to_run_rotated = (
        "Some of its inputs are smoothed or rotated at run time, as only smoothquant-ext does. Other engines refuse it."
    )

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return super().recognizes(config) and config.get("quantization_status") in self.statuses


def _write_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": TYPES[scheme.dtype][0]}
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


class _Group(NamedTuple):
    """One of the ``config_groups``.

    Attributes:
        targets: what it quantizes.
        scheme: ``None`` if it quantizes no weights.
        note: what is not done of it, a sentence.
        weight_only: who reads it, if it quantizes weights alone.
    """

    targets: tuple[str, ...]
    scheme: Scheme | None
    note: str = ""
    weight_only: str = ""


def _parse_group(name: str, group: Mapping[str, Any], targets: tuple[str, ...], where: str) -> _Group:
    weights, inputs, outputs = (group.get(part) for part in ("weights", "input_activations", "output_activations"))
    if not weights:
        # Attention, whose class is the target, or the cache, which is the output of k_proj and v_proj.
        what = " and ".join([*(["inputs"] if inputs else []), *(["outputs"] if outputs else [])]) or "nothing"
        return _Group(
            targets, None, f"{name} quantizes no weights, only {what} of {', '.join(targets)}, kept in floating point"
        )
    note = f"the outputs of the layers of {name} are kept in floating point, not in 8 bits" if outputs else ""
    same_type = {"type": weights.get("type", "int")} if isinstance(weights, Mapping) else {}
    scheme = _parse_scheme(weights, inputs or DYNAMIC | same_type, f"{where}: {name}")
    return _Group(targets, scheme, note, "" if inputs else WEIGHT_ONLY_READERS[scheme.dtype])


def _transforms(config: Mapping[str, Any], where: str) -> tuple[Transform, ...]:
    try:
        return parse_transforms(config.get(CONFIG_KEY), where)
    except SmoothQuantError as error:
        raise NotExecutable(str(error)) from error


def _not_readable(group: Mapping[str, Any], stored: object, where: str) -> SmoothQuantError:
    """The error for a group whose weights are stored otherwise than one 8-bit number each."""
    weights = group["weights"]
    if stored == "pack-quantized" and isinstance(weights, Mapping) and not group.get("input_activations"):
        content = f"weights alone in {weights.get('num_bits', 8)} bits, packed into int32"
        return not_w8a8(where, content, "vLLM, SGLang and transformers")
    return SmoothQuantError(f"{where} is stored as {stored!r}, which is not W8A8; {CONVERT_AGAIN}")


def _parse_scheme(weights: Any, activations: Any, where: str) -> Scheme:
    for part, arguments in (("weights", weights), ("input_activations", activations)):
        if not isinstance(arguments, Mapping):
            raise SmoothQuantError(f"{where} has {part} {arguments!r}, expected an object; {CONVERT_AGAIN}")
        type_name, bits = arguments.get("type", "int"), arguments.get("num_bits", 8)
        if type_name not in DTYPES or bits != 8:
            raise SmoothQuantError(f"{where} has {bits}-bit {type_name} {part}, expected 8 bits; {CONVERT_AGAIN}")
    dtype = DTYPES[weights.get("type", "int")]
    if weights.get("type", "int") != activations.get("type", "int"):
        raise SmoothQuantError(f"{where} mixes int and float in one layer; {CONVERT_AGAIN}")
    symmetric = activations.get("symmetric", True)
    if not weights.get("symmetric", True) or (not symmetric and dtype != torch.int8):
        part = "weights" if symmetric or dtype == torch.int8 else "float input_activations"
        raise SmoothQuantError(f"{where} has asymmetric {part}, expected symmetric ones; {CONVERT_AGAIN}")
    scheme = scheme_of(dtype, *_parse_granularity(weights, activations, where))
    return scheme if symmetric else replace(scheme, name=f"{scheme.name}-asymmetric", symmetric=False)


def _parse_granularity(weights: Mapping[str, Any], activations: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The granularity of scales: ``"channel"`` or ``"tensor"`` of the weight, ``"token"`` or ``"tensor"`` of x."""
    dynamic = activations.get("dynamic", False)
    weight = weights.get("strategy") or "tensor"
    strategy = activations.get("strategy") or ("token" if dynamic else "tensor")
    if {"block", "group"} & {weight, strategy}:
        readers = BLOCK_READERS[DTYPES[weights.get("type", "int")]]
        raise not_w8a8(where, "weights or activations scaled in blocks", readers)
    # One dynamic scale for all tokens of a batch is a makeshift for one per token, which is more exact.
    activation = {("token", True): "token", ("tensor", True): "token", ("tensor", False): "tensor"}.get(
        (strategy, dynamic)
    )
    if weights.get("dynamic", False) or weight not in ("channel", "tensor") or activation is None:
        kind = "dynamic" if dynamic else "static"
        raise SmoothQuantError(
            f"{where} has weight scales per {weight} and {kind} activation scales per {strategy}, "
            f"expected per channel or tensor, and dynamic per token or static per tensor; {CONVERT_AGAIN}"
        )
    return weight, activation
