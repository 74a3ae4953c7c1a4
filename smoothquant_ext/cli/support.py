"""The steps that several commands share: loading models, reading text, parsing values, showing results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import SmoothQuantError
from .console import out, step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..probing.blocks import Batch
    from ..reporting.tables import Measured

CALIBRATION_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:train"
TEST_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHES = ("auto", "int8")
TEST_SAMPLES = 64  # windows
TIMED = 16  # inputs of a model that does not continue texts


@dataclass(frozen=True)
class Speeds:
    """How speed is measured: the options of ``compare``. Models that do not continue texts have rounds alone."""

    rounds: int = 5
    prefill: int = 512
    decode: int = 32
    batch: int = 1


def load(
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    drop: Sequence[str] | None = None,
    task: str | None = None,
) -> tuple[Any, Any]:
    """Loads a model, ready to run, by default on the CPU, and its tokenizer or processor; ``drop`` and ``task`` are the
    options of these names.
    """
    # While it downloads or dequantizes, transformers draws progress bars.
    with step(f"Loading {source}", spinner=Path(source).is_dir()):
        from ..models import load_model

        return load_model(source, dtype, device, drop or (), task=task)


def read_data(
    loaded: tuple[Any, Any], source: str, samples: int, seqlen: int, seed: int, field: str | None = None
) -> Tensor | list[Batch]:
    """Data from a text, images or sounds that the user names, for a model and its tokenizer or processor; token ids
    [samples, seqlen] for a causal language model.
    """
    from ..inputs import OF_TEXT, data_kind, read_batches

    kind = data_kind(loaded[0])
    if kind != OF_TEXT and source in (CALIBRATION_TEXT, TEST_TEXT):
        option = "--calib" if source == CALIBRATION_TEXT else "--text"
        raise SmoothQuantError(f"{type(loaded[0]).__name__} reads {kind}: name a folder of them with {option}")
    with step(f"Reading {source}", spinner=not loaded[0].config.is_encoder_decoder):
        return read_batches(loaded, source, samples, seqlen, seed, field)


def stored_dtype(model: Any, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the saved floating-point parts. By default those of a causal language model have 16 bits, since 32
    would be slow and large; others keep theirs: what they return, such as an embedding, is used as numbers.
    """
    import torch

    from ..traits import predicts_next_token

    loaded: torch.dtype = model.dtype
    return wanted or (torch.bfloat16 if loaded.itemsize != 2 and predicts_next_token(model) else loaded)


def name_of_text(source: str) -> str:
    """The name of a text without the folders of this machine."""
    return Path(source).name if Path(source).exists() else source


def measure_all(
    models: Mapping[str, Any], data: Tensor | list[Batch], reference: Any, speed: Speeds | None = None
) -> list[Measured]:
    """Measures models on data: causal language models by perplexity, others by agreement with a reference."""
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.agreement import agree_all
    from ..evaluation.size import model_bytes
    from ..evaluation.speed import measure_speed, measure_throughput
    from ..inputs import rows_of
    from ..reporting.tables import Measured
    from ..traits import predicts_next_token

    results: Mapping[str, Any]
    speeds: Mapping[str, Any] = {}
    if all(map(predicts_next_token, models.values())):
        results = evaluate_all(models, data, reference, progress=True)
        if speed is not None and speed.rounds:
            speeds = measure_speed(models, speed.prefill, speed.decode, speed.rounds, speed.batch, progress=True)
    else:
        results = agree_all(models, rows_of(data), reference, progress=True)
        if speed is not None and speed.rounds:
            speeds = measure_throughput(models, rows_of(data)[:TIMED], speed.rounds, progress=True)
    return [Measured(name, results[name], model_bytes(models[name]), speeds.get(name)) for name in models]


def only_compared(model: Any) -> str:
    """The sentence about a model that has no perplexity."""
    kind = type(model).__name__
    return f"{kind} does not continue texts, so it can only be compared: name its original with --reference"


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
        out.print(legend(models))


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
