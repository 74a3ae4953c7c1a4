"""The options of the commands: their names, and their descriptions in ``--help``."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from ..checkpoint.formats.registry import written_formats  # imports torch, as the package does, but not transformers
from ..scheme import SCHEMES


def _default_alphas() -> str:
    """The default of most schemes, and the exceptions by name."""
    usual = Counter(scheme.alpha for scheme in SCHEMES.values()).most_common(1)[0][0]
    others = [f", for {scheme.name} {scheme.alpha:g}" for scheme in SCHEMES.values() if scheme.alpha != usual]
    return f"Default: {usual:g}{''.join(others)}."


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model: a directory, a hub id, a GGUF file, or a W8A8 checkpoint.")
]
Served = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model: a directory or a hub id; W8A8 runs on 8-bit kernels.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, or a GPU such as cuda:0.")]
Text = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text to test on: a text or jsonl file, a folder of them, or a dataset as NAME\\[/CONFIG]\\[:SPLIT].",
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        "--calib",
        help="Text to calibrate on: a text or jsonl file, a folder of them, or a dataset as NAME\\[/CONFIG]\\[:SPLIT]. "
        "Text like what the model will be used on works best.",
    ),
]
Samples = Annotated[int, typer.Option(help="How many windows of text, spread evenly over it.", min=1)]
Seqlen = Annotated[int, typer.Option(help="Tokens in each window.", min=2)]
Seed = Annotated[int, typer.Option(help="Decides where the windows begin; the same seed gives the same windows.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="float32, float16 or bfloat16: what the floating-point parts run in. auto: what the checkpoint was stored "
        "in (a GGUF file: float32).",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help=f"How much of the outliers moves from the activations into the weights, 0 to 1. {_default_alphas()}",
    ),
]
AlphaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        help="How much of the outliers moves from the activations into the weights, 0 to 1. "
        f"{_default_alphas()} auto: searches the best for each group of layers, on the real kernels, and rounds "
        "weights by GPTQ; more accurate, takes minutes, and goes on where it stopped if it was cut off.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NoSmooth = Annotated[bool, typer.Option("--no-smooth", help="Quantize without smoothing, to see its worth.")]
Explicit = Annotated[
    bool,
    typer.Option(
        "--explicit",
        help="Also smooth where no layer before takes the scale, as after a GELU, and apply it at run time. Such "
        "a checkpoint is for smoothquant-ext alone.",
    ),
]
AutoSkip = Annotated[
    str | None,
    typer.Option(
        metavar="N|P%",
        help="Measure what each layer costs, and leave the N worst, or P percent of all, in floating point (a "
        "static scheme first tries a scale per token there).",
    ),
]
MaxPplIncrease = Annotated[
    str | None,
    typer.Option(
        metavar="P%",
        help="Leave as many of the worst layers out as keep the perplexity within P percent of the original's, on "
        "calibration text that was held out.",
    ),
]
Rounding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How weights are rounded: nearest, clip or gptq. Default: nearest, with --alpha auto gptq.",
    ),
]
Clipping = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How static activation scales are chosen: absmax, percentile, mse, kl, or auto, the best of these by "
        "measured error. Default: absmax, with --alpha auto auto.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave layers whose name matches, like '*.down_proj' or 'layers.0.*', in floating point."),
]
Only = Annotated[list[str] | None, typer.Option(help="Quantize only layers whose name matches.")]
StoredDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="float32, float16 or bfloat16: what embeddings, norms and all else that stays in floating point is "
        "stored and run in. auto: the checkpoint's own dtype if that has 16 bits, else bfloat16.",
    ),
]
StoredFormat = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="; ".join(f"{name}, read by {fmt.read_by}" for name, fmt in written_formats().items())
        + ". auto: the first of these that can store the model.",
    ),
]
SchemeName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"One of {', '.join(SCHEMES)}. Activations get a scale per token at run time, or with -static one per "
        "layer from calibration: a little less accurate.",
    ),
]
