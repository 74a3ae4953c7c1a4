"""The commands that measure and show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SmoothQuantError
from .console import out
from .options import Alpha, Calib, Dtype, Json, Model, Samples, Seed, Seqlen, Text
from .support import CALIBRATION_TEXT, TEST_TEXT, add_to_card, load, parse_dtype, read_windows, show

if TYPE_CHECKING:
    from torch import nn


def eval(  # noqa: A001
    model: Model,
    text: Text = TEST_TEXT,
    reference: Annotated[
        str | None, typer.Option(help="Also say how closely MODEL follows this one, usually its original.")
    ] = None,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Perplexity of a model on a text and, with --reference, how closely it follows another.

    Example: [bold]smoothquant eval smol-w8a8 --text book.txt --reference HuggingFaceTB/SmolLM2-135M[/bold]
    """
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.size import model_bytes
    from ..reporting.tables import Measured

    wanted = parse_dtype(dtype)
    network, tokenizer = load(model, wanted)
    windows = read_windows(tokenizer, text, samples, seqlen, seed)
    models, base = {model: network}, None
    if reference is not None:
        base, _ = load(reference, wanted)
        models = {reference: base} | models
    results = evaluate_all(models, windows, base, progress=True)
    show([Measured(name, results[name], model_bytes(models[name])) for name in models], json_)


def compare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model to compare with: a directory, a hub id or a GGUF file.")
    ],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="One or more models made from it.")],
    text: Text = TEST_TEXT,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt when measuring speed.", min=1)] = 512,
    decode: Annotated[int, typer.Option(help="Tokens generated after it when measuring speed.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median speed of; 0 measures no speed.", min=0)] = 5,
    batch: Annotated[int, typer.Option(help="Prompts answered at once when measuring speed.", min=1)] = 1,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the results into the model cards of QUANTIZED.")
    ] = False,
    json_: Json = False,
) -> None:
    """Puts models side by side: perplexity, agreement with BASE, size, and tokens per second of prompt and answer.

    Example: [bold]smoothquant compare HuggingFaceTB/SmolLM2-135M smol-w8a8 --text book.txt --dtype bfloat16[/bold]

    All models see the same windows of text, and take turns when speed is
    measured, with as many threads as OMP_NUM_THREADS says.
    """
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.size import model_bytes
    from ..evaluation.speed import measure_speed
    from ..reporting.tables import Measured

    wanted = parse_dtype(dtype)
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys([base, *quantized]):
        models[name], tokenizer = load(name, wanted)
        if name == base:
            windows = read_windows(tokenizer, text, samples, seqlen, seed)
    results = evaluate_all(models, windows, models[base], progress=True)
    speeds = measure_speed(models, prefill, decode, rounds, batch, progress=True) if rounds else {}
    measured = [Measured(name, results[name], model_bytes(models[name]), speeds.get(name)) for name in models]
    show(measured, json_)
    for own in measured[1:] if card else ():
        add_to_card(Path(own.name), text, [measured[0], own])


def inspect(
    model: Model,
    calib: Calib = CALIBRATION_TEXT,
    samples: Samples = 16,
    seqlen: Seqlen = 512,
    alpha: Alpha = None,
    scheme: Annotated[str, typer.Option(help="Whose default alpha to use.")] = "int8",
    plot: Annotated[
        Path | None, typer.Option(help="Also draw it: a .png, .svg or .pdf file (needs matplotlib).")
    ] = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Shows the activation outliers of every layer, before and after smoothing. Writes no model.

    Example: [bold]smoothquant inspect HuggingFaceTB/SmolLM2-135M --calib my_text.txt --plot outliers.png[/bold]

    The number is the largest input channel over the median one: what a single 8-bit scale has to bridge.
    """
    from ..quantization.recipe import Recipe
    from ..reporting.outliers import measure_outliers, outlier_table, plot_outliers

    recipe = Recipe(scheme, alpha)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise SmoothQuantError(f"{plot} cannot be written: {plot.absolute().parent} does not exist, make it first")
    network, tokenizer = load(model, parse_dtype(dtype))
    windows = read_windows(tokenizer, calib, samples, seqlen, seed)
    inputs = measure_outliers(network, windows, recipe, progress=True)
    out.print(outlier_table(inputs))
    if plot is not None:
        plot_outliers(inputs, plot, f"{Path(model).name}, alpha {recipe.migration:g}")
        out.print(f"Picture: {plot}", soft_wrap=True)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that smoothquant quantize wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The HTML file to write. Default: DIR's name and -report.html, here."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model it was made from: also measure both on TEXT, and show the results."
        ),
    ] = None,
    text: Text = TEST_TEXT,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median speed of; 0 measures no speed.", min=0)] = 5,
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Writes one HTML page about a quantized model: what was done to it, its outliers, errors and exceptions.

    Example: [bold]smoothquant report smol-w8a8 -o report.html --base HuggingFaceTB/SmolLM2-135M --text book.txt[/bold]

    The page needs nothing but itself: send it to whom you like. It is drawn from what the checkpoint says about how it
    was made; only with --base are models run.
    """
    from ..checkpoint.record import read_record
    from ..evaluation.accuracy import evaluate_all
    from ..evaluation.size import model_bytes
    from ..evaluation.speed import measure_speed
    from ..reporting.figures import Pictures
    from ..reporting.page import write_page
    from ..reporting.tables import Measured

    wanted = parse_dtype(dtype)
    record = read_record(directory)
    path = output or Path(f"{directory.resolve().name}-report.html")
    if not path.absolute().parent.is_dir():
        raise SmoothQuantError(f"{path} cannot be written: {path.absolute().parent} does not exist, make it first")
    Pictures()  # says what is missing before any long work
    measured: list[Measured] = []
    if base is not None:
        models: dict[str, nn.Module] = {}
        models[base], tokenizer = load(base, wanted)
        windows = read_windows(tokenizer, text, samples, seqlen, seed)
        models[str(directory)], _ = load(str(directory), wanted)
        results = evaluate_all(models, windows, models[base], progress=True)
        speeds = measure_speed(models, rounds=rounds, progress=True) if rounds else {}
        measured = [Measured(name, results[name], model_bytes(models[name]), speeds.get(name)) for name in models]
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    write_page(record, path, directory.resolve().name, measured, weights)
    out.print(f"Report: {path}", soft_wrap=True, highlight=False)


def info() -> None:
    """Says which backend every operator uses on this machine, and why the better ones are not used.

    Example: [bold]smoothquant info[/bold]
    """
    from .. import ops
    from ..reporting.tables import info_table

    try:
        rows = ops.info()
    except RuntimeError as error:  # an instruction set that is not there was asked for
        raise SmoothQuantError(str(error).splitlines()[0]) from error
    out.print(info_table(rows))
