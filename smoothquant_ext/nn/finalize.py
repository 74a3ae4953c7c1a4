"""The last step of making a quantized model: it is frozen, and refuses what 8-bit layers cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..errors import SmoothQuantError
from .experts import W8A8Experts
from .linear import W8A8Linear


def finalize_(model: nn.Module, refused: Mapping[str, str]) -> None:
    """Freezes a quantized model and replaces methods that it cannot offer by errors; leaves a float model as it is.

    Parameters that stay in floating point are frozen so that a forward pass without ``no_grad`` is as fast as one with.

    Args:
        model: the model.
        refused: the names of methods, besides ``gradient_checkpointing_enable``, and the sentence that each raises.
    """
    if not any(isinstance(module, W8A8Linear | W8A8Experts) for module in model.modules()):
        return
    model.requires_grad_(False)
    checkpointing = "an 8-bit model cannot use gradient checkpointing; train adapters without it"
    for method, reason in {"gradient_checkpointing_enable": checkpointing, **refused}.items():
        vars(model)[method] = partial(_refuse, reason)


def _refuse(reason: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise SmoothQuantError(reason)
