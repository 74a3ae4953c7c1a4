"""The commands that measure and show: eval, compare, inspect, report, info."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SmoothQuantError
from .console import out
from .options import Alpha, Calib, Device, Drop, Dtype, Json, Model, Samples, Seed, Seqlen, Task, Text, TextField
from .support import (
    CALIBRATION_TEXT,
    TEST_TEXT,
    Speeds,
    add_to_card,
    load,
    measure_all,
    only_compared,
    parse_device,
    parse_dtype,
    read_data,
    show,
)

if TYPE_CHECKING:
    from torch import nn

    from ..reporting.tables import Measured

PICTURES = (".png", ".svg", ".pdf")


def eval(  # noqa: A001
    model: Model,
    text: Text = TEST_TEXT,
    reference: Annotated[
        str | None, typer.Option(help="Also measure how closely MODEL follows this model, usually its original.")
    ] = None,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    text_field: TextField = None,
    task: Task = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Measures the perplexity of a model on a text and, with --reference, how closely it follows another model.

    Example: [bold]smoothquant eval smol-w8a8 --text book.txt --reference HuggingFaceTB/SmolLM2-135M[/bold]

    A model that does not continue texts (an encoder, a classifier, a model that reads images or sound) is compared with
    --reference: by its predictions, or by the embeddings that it computes.
    """
    from ..traits import predicts_next_token

    wanted, where = parse_dtype(dtype), parse_device(device)
    loaded = load(model, wanted, where, drop, task)
    models, base = {model: loaded[0]}, None
    if reference is not None:
        original = load(reference, wanted, where, drop, task)
        base = original[0]
        models = {reference: base} | models
        if base.config.is_encoder_decoder:
            loaded = original  # both decoders read what it answers
    elif not predicts_next_token(loaded[0]):
        raise SmoothQuantError(only_compared(loaded[0]))
    data = read_data(loaded, text, samples, seqlen, seed, text_field)
    show(measure_all(models, data, base), json_)


def compare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The original model: a directory, a hub id or a GGUF file.")
    ],
    quantized: Annotated[list[str], typer.Argument(metavar="QUANTIZED...", help="Models quantized from BASE.")],
    text: Text = TEST_TEXT,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    text_field: TextField = None,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt in the speed measurement.", min=1)] = 512,
    decode: Annotated[int, typer.Option(help="Tokens generated after it in the speed measurement.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of the speed measurement (median); 0: none.", min=0)] = 5,
    batch: Annotated[int, typer.Option(help="Prompts answered together in the speed measurement.", min=1)] = 1,
    task: Task = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
    seed: Seed = 0,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the results into the model cards of QUANTIZED.")
    ] = False,
    json_: Json = False,
) -> None:
    """Compares models: perplexity, agreement with BASE, size, and tokens per second of prompt and answer.

    Example: [bold]smoothquant compare HuggingFaceTB/SmolLM2-135M smol-w8a8 --text book.txt --dtype bfloat16[/bold]

    All models read the same windows of text. They take turns in the
    measurement of speed. OMP_NUM_THREADS sets the number of threads. Of models
    that do not continue texts, the outputs are compared and inputs timed.
    """
    wanted, where = parse_dtype(dtype), parse_device(device)
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys([base, *quantized]):
        models[name], processor = load(name, wanted, where, drop, task)
        if name == base:
            data = read_data((models[name], processor), text, samples, seqlen, seed, text_field)
    measured = measure_all(models, data, models[base], Speeds(rounds, prefill, decode, batch))
    show(measured, json_)
    for model in measured[1:] if card else ():
        add_to_card(Path(model.name), text, [measured[0], model])


def inspect(
    model: Model,
    calib: Calib = CALIBRATION_TEXT,
    samples: Samples = 16,
    seqlen: Seqlen = 512,
    text_field: TextField = None,
    alpha: Alpha = None,
    scheme: Annotated[str, typer.Option(help="The scheme whose default alpha is used without --alpha.")] = "int8",
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the outliers into this .png, .svg or .pdf file (needs matplotlib).")
    ] = None,
    task: Task = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
    seed: Seed = 0,
) -> None:
    """Prints the activation outliers of every layer, before and after smoothing. Writes no model.

    Example: [bold]smoothquant inspect HuggingFaceTB/SmolLM2-135M --calib my_text.txt --plot outliers.png[/bold]

    The numbers are the largest input channel divided by the median one: the range that a single 8-bit scale must cover.
    """
    from ..quantization.recipe import Recipe
    from ..reporting.outliers import measure_outliers, outlier_table, plot_outliers

    recipe, where = Recipe(scheme, alpha), parse_device(device)
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise SmoothQuantError(f"--plot is {plot}, expected a file that ends in {', '.join(PICTURES)}")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise SmoothQuantError(f"{plot} cannot be written: {plot.absolute().parent} does not exist, make it first")
    loaded = load(model, parse_dtype(dtype), drop=drop, task=task)
    data = read_data(loaded, calib, samples, seqlen, seed, text_field)
    inputs = measure_outliers(loaded[0], data, recipe, progress=True, device=where)
    out.print(outlier_table(inputs))
    if plot is not None:
        plot_outliers(inputs, plot, f"{Path(model).name}, alpha {recipe.migration:g}")
        out.print(f"Picture: {plot}", soft_wrap=True)


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that smoothquant quantize wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The HTML file to write. Default: DIR-report.html, in this directory."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The original model: also measure both models on --text, and show the results."
        ),
    ] = None,
    text: Text = TEST_TEXT,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    text_field: TextField = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the speed measurement (median); 0: none.", min=0)] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    drop: Drop = None,
    seed: Seed = 0,
) -> None:
    """Writes an HTML page about a quantized model: outliers, alpha, errors, layers left in floating point.

    Example: [bold]smoothquant report smol-w8a8 -o report.html --base HuggingFaceTB/SmolLM2-135M --text book.txt[/bold]

    The page is one file without links to others. It shows what quantize recorded in the checkpoint; models run only
    with --base.
    """
    from ..checkpoint.record import read_record
    from ..reporting.figures import Pictures
    from ..reporting.page import write_page
    from ..traits import predicts_next_token

    wanted, where = parse_dtype(dtype), parse_device(device)
    record = read_record(directory)
    path = output or Path(f"{directory.resolve().name}-report.html")
    if not path.absolute().parent.is_dir():
        raise SmoothQuantError(f"{path} cannot be written: {path.absolute().parent} does not exist, make it first")
    Pictures()  # raises before any long work if matplotlib is missing
    measured: list[Measured] = []
    if base is not None:
        original, tokenizer = load(base, wanted, where, drop)
        if not predicts_next_token(original):
            raise SmoothQuantError(
                f"{type(original).__name__} does not continue texts, which the page's measurements are of: leave out "
                "--base, and run smoothquant compare"
            )
        windows = read_data((original, tokenizer), text, samples, seqlen, seed, text_field)
        models = {base: original, str(directory): load(str(directory), wanted, where, drop)[0]}
        measured = measure_all(models, windows, original, Speeds(rounds))
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    write_page(record, path, directory.resolve().name, measured, weights)
    out.print(f"Report: {path}", soft_wrap=True, highlight=False)
