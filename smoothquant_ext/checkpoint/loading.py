"""Loads W8A8 checkpoints of any tool, without ever making the float weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..compat import first_line, quiet_transformers
from ..devices import loaded_on, move_
from ..errors import SmoothQuantError
from .hf_quantizer import METHOD, make_ready_
from .reading import COPY_AGAIN, read_config
from .record import RECORD, read_record

# Suffixes of tensors that may be ignored: zero points of zero, and scales of caches that are kept in floating point.
_DISPENSABLE = ("_zero_point", ".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".output_scale", ".input_scale_ub")


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    drop: Sequence[str] = (),
) -> PreTrainedModel:
    """Loads a W8A8 checkpoint of this package or of another tool, ready to run on 8-bit kernels.

    The 8-bit weights are read from the files into ``W8A8Linear`` modules; the float weights never exist.

    Args:
        directory: a Hugging Face directory in one of ``formats.registry.FORMATS``, safetensors only.
        device: the device to load to, the CPU by default. With accelerate installed the weights are read straight to a
            GPU, and a model that is too large for it is spread over main memory too.
        dtype: the dtype of everything that is not quantized; ``None`` takes that of the checkpoint.
        drop: shell patterns like ``"mtp.*"`` for names of tensors that the model has no place for and that may be left
            out.

    Returns:
        The model in evaluation mode.

    Raises:
        SmoothQuantError: the checkpoint is incomplete, damaged, inconsistent, or not W8A8.
    """
    path = Path(directory)
    read_config(path)  # says what is missing before transformers does
    on_cpu = device is None or torch.device(device).type == "cpu"
    with quiet_transformers():
        model, info = loaded_on(device, partial(_load, path, dtype, on_cpu, drop))
    _check_loaded(path, info)
    _attach_record(model, path)
    model.eval()
    if move_(model, device):
        make_ready_(model)
    return model


def _load(
    path: Path, dtype: torch.dtype | None, on_cpu: bool, drop: Sequence[str], options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and transformers' information about its loading; ``options`` are for ``from_pretrained``."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.quantization_config = {
            "quant_method": METHOD,
            "directory": str(path),
            "infer_dtype": dtype is None and getattr(config, "dtype", None) is None,
            "ready": on_cpu or bool(options),  # else it has yet to move
            "drop": list(drop),
        }
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (SmoothQuantError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers raises for a configuration it cannot build
        raise SmoothQuantError(f"{path}: transformers cannot load this model ({first_line(error)})") from error
    return model, info


def _attach_record(model: PreTrainedModel, path: Path) -> None:
    """Keeps the checkpoint's record for the next save; a record that cannot be read costs the record only."""
    if (path / RECORD).is_file():
        try:
            model.smoothquant_record = read_record(path)
        except SmoothQuantError as error:
            warnings.warn(f"{error}; the model runs without its record", stacklevel=3)


def _check_loaded(path: Path, info: Mapping[str, Any]) -> None:
    for name in sorted(info["missing_keys"]):
        raise SmoothQuantError(f"{path} lacks the tensor {name}, which config.json calls for; {COPY_AGAIN}")
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.endswith(_DISPENSABLE))
    if unexpected:
        warnings.warn(
            f"{path}: ignored {len(unexpected)} tensors that the model has no place for, such as {unexpected[0]}",
            stacklevel=3,
        )
