"""Loads W8A8 checkpoints of any tool, without ever making the float weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from ..compat import first_line, quiet_transformers
from ..devices import loaded_on, move_
from ..errors import SmoothQuantError
from ..ops.backends import check_cpu_isa
from .completeness import load_complete
from .hf_quantizer import METHOD, make_ready_
from .model_classes import model_class
from .reading import read_headers
from .record import RECORD, read_record
from .source_files import check_directory


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    drop: Sequence[str] = (),
    as_w8a8: bool = False,
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
        as_w8a8: whether a checkpoint with 8-bit weights and activations in floating point (W8A16) is loaded too. Its
            activations are then quantized, with a scale per token, which is another model than the checkpoint's.

    Returns:
        The model in evaluation mode, of the class that config.json names.

    Raises:
        SmoothQuantError: the checkpoint is incomplete, damaged, inconsistent, or not W8A8, or holds tensors that the
            model has no place for.
    """
    return load_as(directory, device, dtype, drop, as_w8a8=as_w8a8)


def load_as(
    directory: str | os.PathLike[str],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    drop: Sequence[str],
    task: str | None = None,
    as_w8a8: bool = False,
) -> PreTrainedModel:
    """``load``, as the class for a task (see ``model_class``)."""
    check_cpu_isa()
    path = Path(directory)
    check_directory(path)  # says what is missing before transformers does
    on_cpu = device is None or torch.device(device).type == "cpu"
    with quiet_transformers():
        model = loaded_on(device, partial(_load, path, dtype, on_cpu, drop, task, as_w8a8))
    _attach_record(model, path)
    model.eval()
    if move_(model, device):
        make_ready_(model)
    return model


def _load(
    path: Path,
    dtype: torch.dtype | None,
    on_cpu: bool,
    drop: Sequence[str],
    task: str | None,
    as_w8a8: bool,
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """The model; ``options`` are for ``from_pretrained``."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        config.quantization_config = {
            "quant_method": METHOD,
            "directory": str(path),
            "infer_dtype": dtype is None and getattr(config, "dtype", None) is None,
            "ready": on_cpu or bool(options),  # else it has yet to move
            "as_w8a8": as_w8a8,
        }
        return load_complete(
            model_class(config, str(path), task),
            path,
            drop,
            read_headers(path),
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (SmoothQuantError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers raises for a configuration it cannot build
        raise SmoothQuantError(f"{path}: transformers cannot load this model ({first_line(error)})") from error


def _attach_record(model: PreTrainedModel, path: Path) -> None:
    """Keeps the checkpoint's record for the next save; a record that cannot be read costs the record only."""
    if (path / RECORD).is_file():
        try:
            model.smoothquant_record = read_record(path)
        except SmoothQuantError as error:
            warnings.warn(f"{error}; the model runs without its record", stacklevel=3)
