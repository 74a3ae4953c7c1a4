"""The steps that several commands share: loading models, reading text, parsing values, showing results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
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


def load(
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    drop: Sequence[str] | None = None,
    as_w8a8: bool = False,
) -> tuple[Any, Any]:
    """Loads a model, ready to run, by default on the CPU, and its tokenizer; ``drop`` and ``as_w8a8`` are options."""
    # While it downloads or dequantizes, transformers draws progress bars.
    with step(f"Loading {source}", spinner=Path(source).is_dir()):
        from ..models import load_model

        return load_model(source, dtype, device, drop or (), as_w8a8)


def read_windows(
    loaded: tuple[Any, Any], text: str, samples: int, seqlen: int, seed: int, field: str | None = None
) -> Tensor:
    """Token ids [samples, seqlen] from a text that the user names, for a model that was loaded with its tokenizer."""
    with step(f"Reading {text}"):
        from ..text import token_windows

        model, tokenizer = loaded
        return token_windows(tokenizer, text, samples, seqlen, seed, model, field)


def stored_dtype(loaded: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the saved floating-point parts. The default has 16 bits: 32 would be slow and large."""
    import torch

    return wanted or (loaded if loaded.itemsize == 2 else torch.bfloat16)


def name_of_text(source: str) -> str:
    """The name of a text without the folders of this machine."""
    return Path(source).name if Path(source).exists() else source


def measure(base: str, quantized: Any, name: str, windows: Tensor, drop: Sequence[str] | None = None) -> list[Measured]:
    """Measures ``base``, loaded again, and ``quantized``, which was made from it, on windows of text."""
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.size import model_bytes
    from ..reporting.tables import Measured

    original, _ = load(base, quantized.dtype, quantized.device, drop)
    models = {base: original, name: quantized}
    results = evaluate_all(models, windows, original, progress=True)
    return [Measured(name, results[name], model_bytes(model)) for name, model in models.items()]


def add_to_card(directory: Path, text: str, measured: list[Measured]) -> None:
    """Writes the results of the second of two models, compared with the first, into its model card."""
    from ..checkpoint.model_card import add_measured, measured_facts

    base, quantized = measured
    rows = [measured_facts(name_of_text(text), Path(base.name).name, quantized.evaluation)]
    add_measured(directory, rows)
    out.print(f"The results are in {directory / 'README.md'}.", soft_wrap=True, highlight=False)


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


def parse_device(name: str) -> torch.device:
    """The device of that name."""
    from ..devices import named_device

    return named_device(name)


def choose(option: str, value: str, allowed: tuple[str, ...]) -> str | None:
    """Checks the value of an option; ``None`` for auto."""
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
    """Quotes an argument for a shell."""
    return shlex.quote(str(argument))
