"""The list of checkpoint formats, and the choice among them.

Reading takes any of them. What holds something other than W8A8 gets a sentence that says what it is, and who reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from ...errors import SmoothQuantError
from ...scheme import Scheme
from .base import CONVERT_AGAIN, Format, QuantizationMap
from .compressed_tensors import CompressedTensors, Smoothed
from .fp8 import FbgemmFp8, Fp8, ModelOpt
from .lmdeploy import LMDeploy

FORMATS: tuple[Format, ...] = (
    CompressedTensors(),
    LMDeploy(),
    Smoothed(),
    Fp8(),
    FbgemmFp8(),
    ModelOpt(),
)
"""Every format. Of those that can store a model, ``save`` takes the first; of those that recognize a configuration, the
last reads it, so a special case stands behind the general one."""

# Other quantization methods by their quant_method: what they are, and who reads them.
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


def quant_methods() -> list[str]:
    """The values of ``quant_method`` of checkpoints that may be W8A8."""
    return list(dict.fromkeys(fmt.quant_method for fmt in FORMATS))


def config_files() -> list[str]:
    """The names of files that may say how a model is quantized where its config.json does not."""
    return [fmt.config_file for fmt in FORMATS if fmt.config_file is not None]


def written_formats() -> dict[str, Format]:
    """The formats that ``save`` writes, by name."""
    return {fmt.name: fmt for fmt in FORMATS if fmt.dtypes}


def parse_quantization_config(config: object, where: str) -> QuantizationMap:
    """Reads the ``quantization_config`` of a config.json.

    Args:
        config: its value, or the content of a format's ``config_file``.
        where: the file's name, for messages.

    Raises:
        SmoothQuantError: it describes something other than W8A8 with scales per channel or tensor, which it names.
    """
    if not isinstance(config, Mapping):
        raise SmoothQuantError(f"{where}: quantization_config is {config!r}, expected an object; {CONVERT_AGAIN}")
    fmt = next((fmt for fmt in reversed(FORMATS) if fmt.recognizes(config)), None)
    if fmt is not None:
        return fmt.parse(config, where)
    method = config.get("quant_method")
    kind, readers = _NOT_W8A8.get(str(method).lower(), ("", ""))
    description = f"{kind}, read by {readers}" if kind else repr(method)
    raise SmoothQuantError(f"{where}: the model is quantized with {description}, which is not W8A8; {CONVERT_AGAIN}")


def choose_format(name: str | None, schemes: Sequence[Scheme], explicit: bool = False) -> Format:
    """The format to write a model in, checked to be able to store it.

    Args:
        name: of the format; ``None`` chooses the first that can store the model.
        schemes: the schemes of the model's layers.
        explicit: whether a layer has an explicit smoothing scale.

    Raises:
        SmoothQuantError: the format is unknown, or cannot store the model.
    """
    written = written_formats()
    if name is not None and name not in written:
        raise SmoothQuantError(f"unknown format {name!r}, expected one of {', '.join(written)}")
    reasons = {fmt.name: fmt.cannot_store(schemes, explicit) for fmt in written.values()}
    able = [fmt for fmt in written.values() if not reasons[fmt.name]]
    if name is None and able:
        return able[0]
    if name is not None and not reasons[name]:
        return written[name]
    refused = [name] if name is not None else list(written)
    problem = ", ".join(f"format {each!r} {reasons[each]}" for each in refused)
    advice = f"use format {able[0].name!r} or another recipe" if able else "use another recipe"
    raise SmoothQuantError(f"{problem}; {advice}")
