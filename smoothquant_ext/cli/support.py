"""What several commands do: load models, read text, understand values, show results."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import SmoothQuantError
from .console import out, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..reporting.tables import Measured

CALIBRATION_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:train"
TEST_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHES = ("auto", "int8")
TEST_SAMPLES = 64  # windows


def load(source: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A model ready to run and its tokenizer."""
    # transformers draws bars of its own when it downloads or dequantizes.
    with step(f"Loading {source}", spinner=Path(source).is_dir()):
        from ..models import load_model

        return load_model(source, dtype)


def read_windows(tokenizer: Any, text: str, samples: int, seqlen: int, seed: int) -> Tensor:
    """Token ids [samples, seqlen] from a text that the user names."""
    with step(f"Reading {text}"):
        from ..text import token_windows

        return token_windows(tokenizer, text, samples, seqlen, seed)


def stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What floating-point parts are saved in: 8-bit layers beside 32-bit ones would be slow and large."""
    import torch

    return wanted or (own if own.itemsize == 2 else torch.bfloat16)


def name_of_text(source: str) -> str:
    """What a text is called, without the folders it lies in here."""
    return Path(source).name if Path(source).exists() else source


def measure(base: str, quantized: Any, name: str, windows: Tensor) -> list[Measured]:
    """The model that ``quantized`` was made from, loaded again, and ``quantized`` itself, on windows of text."""
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.size import model_bytes
    from ..reporting.tables import Measured

    original, _ = load(base, quantized.dtype)
    models = {base: original, name: quantized}
    results = evaluate_all(models, windows, original, progress=True)
    return [Measured(name, results[name], model_bytes(model)) for name, model in models.items()]


def add_to_card(directory: Path, text: str, measured: list[Measured]) -> None:
    """Writes into a checkpoint's model card how it compares with the first of two models that were measured."""
    from ..checkpoint.model_card import add_measured, measured_facts

    base, own = measured
    rows = [measured_facts(name_of_text(text), Path(base.name).name, own.evaluation)]
    add_measured(directory, rows)
    out.print(f"Results are in {directory / 'README.md'}.", soft_wrap=True, highlight=False)


def show(models: list[Measured], as_json: bool) -> None:
    """Prints models side by side, as a table or as JSON."""
    from ..reporting.tables import WIDE, comparison_table, legend, measured_dict

    if as_json:
        sys.stdout.write(json.dumps([measured_dict(model) for model in models], indent=2) + "\n")
        return
    short = [replace(model, name=Path(model.name).name) for model in models]
    if len({model.name for model in short}) == len(models):
        models = short
    out.print(comparison_table(models, errors=out.width >= WIDE))
    if len(models) > 1:
        out.print(legend())


def parse_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name, ``None`` for auto."""
    import torch

    return None if choose("dtype", name, DTYPES) is None else cast(torch.dtype, getattr(torch, name))


def choose(option: str, value: str, allowed: tuple[str, ...]) -> str | None:
    """The value, ``None`` for auto."""
    if value not in allowed:
        raise SmoothQuantError(f"--{option} is {value!r}, expected one of {', '.join(allowed)}")
    return None if value == "auto" else value


def parse_number(option: str, value: str) -> float:
    """``5`` or ``0.5`` as they are, ``5%`` as 0.05."""
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise SmoothQuantError(f"--{option} is {value!r}, expected a number") from None


def parse_count_or_share(option: str, value: str) -> float:
    """A number of layers as it is, a percentage as a share below 1."""
    number = parse_number(option, value)
    if value.endswith("%") and not 0 <= number < 1:
        raise SmoothQuantError(f"--{option} is {value!r}, expected a percentage below 100")
    return number


def quoted(argument: object) -> str:
    """As a shell wants it."""
    return shlex.quote(str(argument))
