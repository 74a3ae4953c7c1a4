"""Discovery once for models of one architecture: it takes most of the time in which a tiny model is quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest

from smoothquant_ext.probing.smoothing_groups import Discovery, discover
from smoothquant_ext.probing.structure import Structure
from smoothquant_ext.quantization import pipeline

_DISCOVERIES: dict[object, Discovery] = {}


@pytest.fixture
def discover_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``quantize`` takes the groups of an earlier model with the same modules, configuration, shapes and layers.

    Groups are a property of the architecture, not of its weights: outliers that are put in by hand do not change them.
    """

    def remembered(structure: Structure, progress: Callable[[Any], Any], running: Collection[str]) -> Discovery:
        model = structure.model
        shapes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters())
        key = str(model), str(getattr(model, "config", "")), shapes, tuple(sorted(running))
        if key not in _DISCOVERIES:
            _DISCOVERIES[key] = discover(structure, progress, running)
        return _DISCOVERIES[key]

    monkeypatch.setattr(pipeline, "discover", remembered)
