"""The last step of making a quantized model: it is frozen, and refuses what 8-bit layers cannot do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    forget_ties_(model)
    checkpointing = "an 8-bit model cannot use gradient checkpointing; train adapters without it"
    for method, reason in {"gradient_checkpointing_enable": checkpointing, **refused}.items():
        vars(model)[method] = partial(_refuse, reason)


def forget_ties_(model: nn.Module) -> None:
    """Makes transformers forget ties of weights that are 8-bit now: it ties parameters, which these are not."""
    for module in model.modules():  # a model may hold others, which have ties of their own
        # The second are the class's own, patterns, which it expands when it is asked to tie its weights.
        for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
            tied = getattr(module, attribute, None)
            if isinstance(tied, Mapping) and tied:
                names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
                kept = {key: source for key, source in tied.items() if _is_in(names, key) and _is_in(names, source)}
                if len(kept) < len(tied):
                    setattr(module, attribute, kept)


def _is_in(names: Sequence[str], pattern: str) -> bool:
    return pattern in names or any(re.match(pattern, name) for name in names)


def _refuse(reason: str, *_args: Any, **_kwargs: Any) -> NoReturn:
    raise SmoothQuantError(reason)
