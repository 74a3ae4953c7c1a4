"""Directories of models, and what may be done to their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_words import tokenizer
from torch import Tensor

from smoothquant_ext.errors import SmoothQuantError

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Tensors]


def write(model: Any, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    tokenizer().save_pretrained(directory)
    return directory


def change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def change_tensors(directory: Path, change: Change) -> None:
    file = directory / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, {"format": "pt"})


def said(load: Callable[[], object]) -> str:
    """The sentence with which loading is refused, nothing else having been said."""
    with pytest.raises(SmoothQuantError) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(*names: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_zeros(**names: tuple[int, ...]) -> Change:
    return lambda tensors: tensors | {name: torch.zeros(shape) for name, shape in names.items()}


def prefixed(prefix: str) -> Change:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}
