"""The command line: arguments only. Heavy imports happen inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .cli_options import (
    Alpha,
    AlphaOrAuto,
    AutoSkip,
    Calib,
    Clipping,
    Dtype,
    Explicit,
    Json,
    MaxPplIncrease,
    Model,
    NoSmooth,
    Only,
    Rounding,
    Samples,
    Seed,
    Seqlen,
    Skip,
    StoredDtype,
    StoredFormat,
    Text,
)
from .console import Commands, err, out, step
from .errors import SmoothQuantError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .report import Measured

CALIBRATION_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:train"
TEST_TEXT = "Salesforce/wikitext/wikitext-2-raw-v1:test"
DTYPES = ("auto", "float32", "float16", "bfloat16")
KV_CACHES = ("auto", "int8")
FORMATS = ("auto", "compressed-tensors", "lmdeploy", "smoothquant-ext")

app = typer.Typer(
    cls=Commands,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def smoothquant(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Makes language models run in 8 bits: weights and activations, on real INT8 and FP8 kernels.

    First [bold]smoothquant quantize MODEL -o DIR[/bold], then [bold]smoothquant compare MODEL DIR[/bold] and
    [bold]smoothquant generate DIR "Once upon a time"[/bold].
    """
    if version:
        from importlib.metadata import version as installed_version

        out.print(f"smoothquant-ext {installed_version('smoothquant-ext')}", highlight=False)
        raise typer.Exit


@app.command()
def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write; new, empty or a W8A8 checkpoint.")
    ],
    scheme: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="int8, int8-static, fp8, fp8-static or fp8-e5m2. Activations get a scale per token at run time, or "
            "with -static one per layer from calibration: a little less accurate.",
        ),
    ] = "int8",
    alpha: AlphaOrAuto = None,
    no_smooth: NoSmooth = False,
    explicit: Explicit = False,
    auto_skip: AutoSkip = None,
    max_ppl_increase: MaxPplIncrease = None,
    rounding: Rounding = None,
    clipping: Clipping = None,
    calib: Calib = CALIBRATION_TEXT,
    samples: Samples = 128,
    seqlen: Seqlen = 512,
    skip: Skip = None,
    only: Only = None,
    dtype: StoredDtype = "auto",
    format: StoredFormat = "auto",  # noqa: A002
    seed: Seed = 0,
) -> None:
    """Smooths a model, quantizes it to 8 bits and saves it.

    Example: [bold]smoothquant quantize HuggingFaceTB/SmolLM2-135M -o smol-w8a8 --calib my_text.txt[/bold]

    Needs a few thousand tokens of any text for calibration. What can be
    smoothed is found by probing the model, and every change is proved to keep
    its function. Output embedding and expert routers stay in floating point.
    """
    from . import checkpoint
    from .formats import choose_format
    from .quantize import quantize as quantize_
    from .report import render_report
    from .scheme import AUTO, Recipe

    recipe = Recipe(
        scheme,
        alpha if alpha is None or alpha == AUTO else _number("alpha", alpha),
        not no_smooth,
        explicit,
        cast(Any, rounding),
        cast(Any, clipping),
        0 if auto_skip is None else _count_or_share("auto-skip", auto_skip),
        None if max_ppl_increase is None else _number("max-ppl-increase", max_ppl_increase),
        tuple(skip or ()),
        tuple(only or ()),
    )
    chosen = choose_format(_choice("format", format, FORMATS), [recipe.resolved_scheme], explicit)
    stored = _dtype(dtype)
    target = checkpoint.check_destination(output)

    start = time.perf_counter()
    network, tokenizer = _load(model)
    windows = _windows(tokenizer, calib, samples, seqlen, seed)
    quantize_(network, windows, recipe, journal=target.with_name(f".{target.name}.search"))
    network.to(_stored_dtype(network.dtype, stored))
    with step(f"Saving to {output}"):
        checkpoint.save(network, output, tokenizer, chosen.name)

    out.print(render_report(network.smoothquant_report))
    files = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    out.print(f"Saved to {output}: {files / 1e6:.1f} MB of weights, {time.perf_counter() - start:.0f} s in all.")
    out.print("What to run next:", style="bold")
    text = "" if calib == CALIBRATION_TEXT else f" --text {_quoted(calib)}"
    out.print(f"  smoothquant compare {_quoted(model)} {_quoted(output)}{text}", soft_wrap=True, highlight=False)
    out.print(f'  smoothquant generate {_quoted(output)} "Once upon a time"', soft_wrap=True, highlight=False)


@app.command()
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
    from .evaluate import evaluate_all, model_bytes
    from .report import Measured

    wanted = _dtype(dtype)
    network, tokenizer = _load(model, wanted)
    windows = _windows(tokenizer, text, samples, seqlen, seed)
    models, base = {model: network}, None
    if reference is not None:
        base, _ = _load(reference, wanted)
        models = {reference: base} | models
    results = evaluate_all(models, windows, base, progress=True)
    _show([Measured(name, results[name], model_bytes(models[name])) for name in models], json_)


@app.command()
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
    json_: Json = False,
) -> None:
    """Puts models side by side: perplexity, agreement with BASE, size, and tokens per second of prompt and answer.

    Example: [bold]smoothquant compare HuggingFaceTB/SmolLM2-135M smol-w8a8 --text book.txt --dtype bfloat16[/bold]

    All models see the same windows of text, and take turns when speed is
    measured, with as many threads as OMP_NUM_THREADS says.
    """
    from .evaluate import evaluate_all, measure_speed, model_bytes
    from .report import Measured

    wanted = _dtype(dtype)
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys([base, *quantized]):
        models[name], tokenizer = _load(name, wanted)
        if name == base:
            windows = _windows(tokenizer, text, samples, seqlen, seed)
    results = evaluate_all(models, windows, models[base], progress=True)
    speeds = measure_speed(models, prefill, decode, rounds, batch, progress=True) if rounds else {}
    _show([Measured(name, results[name], model_bytes(models[name]), speeds.get(name)) for name in models], json_)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the model is to continue, or with --chat, to answer.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.", min=1)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token; higher is more adventurous.", min=0.0)
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat PROMPT as a message to an instruction-tuned model.")
    ] = False,
    kv_cache: Annotated[
        str,
        typer.Option(help="int8 keeps what the model remembers of the text in 8 bits: about half the memory of auto."),
    ] = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Continues a prompt, word by word.

    Example: [bold]smoothquant generate smol-w8a8 "The state of our union is" --max-new-tokens 40[/bold]
    """
    import torch
    from transformers import TextStreamer

    wants_int8_cache = _choice("kv-cache", kv_cache, KV_CACHES) == "int8"
    network, tokenizer = _load(model, _dtype(dtype))
    if wants_int8_cache:
        from .int8_cache import use_int8_cache_

        use_int8_cache_(network)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise SmoothQuantError(f"{model} has no chat template, so it is no chat model: leave --chat out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if inputs.input_ids.shape[1] == 0:
        raise SmoothQuantError("the prompt is empty: give the model something to continue")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    tokens = cast(Any, network).generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    count, seconds = tokens.shape[1] - inputs.input_ids.shape[1], time.perf_counter() - start
    err.print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} a second", style="dim", highlight=False)


@app.command()
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
    from .outliers import measure_outliers, outlier_table, plot_outliers
    from .scheme import Recipe

    recipe = Recipe(scheme, alpha)
    if plot is not None and not plot.absolute().parent.is_dir():
        raise SmoothQuantError(f"{plot} cannot be written: {plot.absolute().parent} does not exist, make it first")
    network, tokenizer = _load(model, _dtype(dtype))
    windows = _windows(tokenizer, calib, samples, seqlen, seed)
    inputs = measure_outliers(network, windows, recipe, progress=True)
    out.print(outlier_table(inputs))
    if plot is not None:
        plot_outliers(inputs, plot, f"{Path(model).name}, alpha {recipe.migration:g}")
        out.print(f"Picture: {plot}", soft_wrap=True)


@app.command()
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
    from .evaluate import evaluate_all, measure_speed, model_bytes
    from .record import read_record
    from .report import Measured
    from .report_figures import Pictures
    from .report_page import write_page

    wanted = _dtype(dtype)
    record = read_record(directory)
    path = output or Path(f"{directory.resolve().name}-report.html")
    if not path.absolute().parent.is_dir():
        raise SmoothQuantError(f"{path} cannot be written: {path.absolute().parent} does not exist, make it first")
    Pictures()  # says what is missing before any long work
    measured: list[Measured] = []
    if base is not None:
        models: dict[str, nn.Module] = {}
        models[base], tokenizer = _load(base, wanted)
        windows = _windows(tokenizer, text, samples, seqlen, seed)
        models[str(directory)], _ = _load(str(directory), wanted)
        results = evaluate_all(models, windows, models[base], progress=True)
        speeds = measure_speed(models, rounds=rounds, progress=True) if rounds else {}
        measured = [Measured(name, results[name], model_bytes(models[name]), speeds.get(name)) for name in models]
    weights = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    write_page(record, path, directory.resolve().name, measured, weights)
    out.print(f"Report: {path}", soft_wrap=True, highlight=False)


@app.command()
def info() -> None:
    """Says which backend every operator uses on this machine, and why the better ones are not used.

    Example: [bold]smoothquant info[/bold]
    """
    from . import ops
    from .report import info_table

    try:
        rows = ops.info()
    except RuntimeError as error:  # an instruction set that is not there was asked for
        raise SmoothQuantError(str(error).splitlines()[0]) from error
    out.print(info_table(rows))


def main() -> None:
    """The console entry point."""
    app()


def _load(source: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A model ready to run and its tokenizer."""
    # transformers draws bars of its own when it downloads or dequantizes.
    with step(f"Loading {source}", spinner=Path(source).is_dir()):
        from .models import load_model

        return load_model(source, dtype)


def _windows(tokenizer: Any, text: str, samples: int, seqlen: int, seed: int) -> Tensor:
    with step(f"Reading {text}"):
        from .text import token_windows

        return token_windows(tokenizer, text, samples, seqlen, seed)


def _stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What floating-point parts are saved in: 8-bit layers beside 32-bit ones would be slow and large."""
    import torch

    return wanted or (own if own.itemsize == 2 else torch.bfloat16)


def _show(models: list[Measured], as_json: bool) -> None:
    from .report import WIDE, comparison_table, legend, measured_dict

    if as_json:
        sys.stdout.write(json.dumps([measured_dict(model) for model in models], indent=2) + "\n")
        return
    short = [replace(model, name=Path(model.name).name) for model in models]
    if len({model.name for model in short}) == len(models):
        models = short
    out.print(comparison_table(models, errors=out.width >= WIDE))
    if len(models) > 1:
        out.print(legend())


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if _choice("dtype", name, DTYPES) is None else cast(torch.dtype, getattr(torch, name))


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> str | None:
    """The value, ``None`` for auto."""
    if value not in allowed:
        raise SmoothQuantError(f"--{option} is {value!r}, expected one of {', '.join(allowed)}")
    return None if value == "auto" else value


def _number(option: str, value: str) -> float:
    """``5`` or ``0.5`` as they are, ``5%`` as 0.05."""
    try:
        return float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise SmoothQuantError(f"--{option} is {value!r}, expected a number") from None


def _count_or_share(option: str, value: str) -> float:
    """A number of layers as it is, a percentage as a share below 1."""
    number = _number(option, value)
    if value.endswith("%") and not 0 <= number < 1:
        raise SmoothQuantError(f"--{option} is {value!r}, expected a percentage below 100")
    return number


def _quoted(argument: object) -> str:
    return shlex.quote(str(argument))
