"""The options of the commands: names and help texts."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from ..checkpoint.formats.registry import written_formats  # imports torch, as the package does, but not transformers
from ..scheme import SCHEMES


def _default_alphas() -> str:
    """The default of most schemes, and the exceptions by name."""
    usual = Counter(scheme.alpha for scheme in SCHEMES.values()).most_common(1)[0][0]
    others = [f"; {scheme.name}: {scheme.alpha:g}" for scheme in SCHEMES.values() if scheme.alpha != usual]
    return f"Default: {usual:g}{''.join(others)}."


Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model: a directory, a hub id or a GGUF file.")]
Served = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model: a directory or a hub id; W8A8 runs on 8-bit kernels.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where the model runs: cpu, cuda, or one GPU of several as in cuda:1. auto: a GPU if torch sees one.",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What the model is to do, where config.json names no class or another one: text-generation, "
        "feature-extraction, fill-mask, text-classification, automatic-speech-recognition, image-classification ...",
    ),
]
Text = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text to test on: a file of text or of rows (json, jsonl, csv, parquet), a folder of them, or a dataset "
        "as NAME\\[/CONFIG]\\[:SPLIT]. For a model that reads images or sound: a folder of these.",
    ),
]
Calib = Annotated[
    str,
    typer.Option(
        "--calib",
        help="Text to calibrate on: a file of text or of rows (json, jsonl, csv, parquet), a folder of them, or a "
        "dataset as NAME\\[/CONFIG]\\[:SPLIT]. Conversations go through the model's chat template. Text like the text "
        "the model will read later works best. For a model that reads images or sound: a folder of these.",
    ),
]
Samples = Annotated[int, typer.Option(help="Number of windows, spread evenly over the text.", min=1)]
CalibrationSamples = Annotated[
    int | None,
    typer.Option(
        help="Number of windows, spread evenly over the text. Default: 4 tokens for each channel of the widest layer, "
        "in 16 to 128 windows; 128 images or 32 sounds. More take longer, in proportion.",
        min=1,
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="The field of rows that holds the text or the conversation, where it cannot be told."
    ),
]
Seqlen = Annotated[
    int, typer.Option(help="Tokens in each window; fewer, with a warning, if the model has fewer positions.", min=2)
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the windows' positions; the same seed gives the same windows.", min=0, max=2**63 - 1),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Load the model without its tensors of matching names, like 'mtp.*', which its class has no place for.",
    ),
]
AsW8A8 = Annotated[
    bool,
    typer.Option(
        "--as-w8a8",
        help="Also take a checkpoint whose weights alone have 8 bits (W8A16). Its activations are then quantized, with "
        "a scale per token: another model, to be compared with the original.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Dtype of the floating-point parts: float32, float16 or bfloat16. auto: the checkpoint's dtype (of a GGUF "
        "file: float32).",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="How far smoothing moves outliers from activations to weights, 0 to 1. " + _default_alphas(),
    ),
]
AlphaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        help=f"How far smoothing moves outliers from activations to weights, 0 to 1. {_default_alphas()} "
        "auto: searches the best alpha for each group of layers on the real kernels, and rounds weights by GPTQ. It is "
        "more accurate and takes minutes; the same command resumes an interrupted search.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NoSmooth = Annotated[bool, typer.Option("--no-smooth", help="Quantize without smoothing, to measure its effect.")]
Explicit = Annotated[
    bool,
    typer.Option(
        "--explicit",
        help="Also smooth layers where no previous layer can absorb the scale, as after a GELU; it is then applied at "
        "run time. Only smoothquant-ext reads such a checkpoint.",
    ),
]
Rotate = Annotated[
    str | None,
    typer.Option(
        metavar="KINDS",
        help="Rotate activations, which spreads outliers over all channels. residual (the residual "
        "stream; a head that shares its weight with the token embedding is stored apart then) and heads (the "
        "values of attention) are folded into weights. down (what down_proj reads) and inputs (what every layer "
        "reads) are done while activations are quantized, after smoothing where scales are per token; they are more "
        "accurate, but only this package and, by its source, vLLM run them. none: nothing. "
        "auto among them: only if that lowers the error of the blocks that are tried, and makes no checkpoint "
        "larger; alone it stands for residual,heads,down. Default with int8: inputs,auto; with int8-static, --explicit "
        "or a --format of other engines residual,heads,auto.",
    ),
]
HeadBits = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="float|8bit|auto",
        help="Whether the output embedding has 8 bits, and with it the token embedding that shares its weight; its "
        "input is smoothed and, with INT8, rotated at run time, which only this package does. auto: if that adds less "
        "than 0.0005 nats a token to the KL divergence. Default: auto where the format is smoothquant-ext, else float.",
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Round weights to nearest, and try no rotation: with int8 the inputs of all layers are rotated, with a "
        "--format of other engines nothing is. Takes a little over half the time, loses a little more.",
    ),
]
AutoSkip = Annotated[
    str | None,
    typer.Option(
        metavar="N|P%",
        help="Measure how much each layer changes the predictions, and leave the worst N, or P percent, in floating "
        "point. A static scheme first tries a scale per token for them.",
    ),
]
MaxPplIncrease = Annotated[
    str | None,
    typer.Option(
        metavar="P%",
        help="Leave as many layers in floating point as needed to keep the perplexity within P percent of the "
        "original's, on held-out calibration text.",
    ),
]
Rounding = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Rounding of weights: nearest, clip or gptq. Default: gptq with INT8 or --alpha auto; nearest with FP8 or "
        "--fast.",
    ),
]
Clipping = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Choice of static activation scales: absmax, percentile, mse, kl, or auto, the one with the smallest "
        "measured error. Default: absmax; with --alpha auto: auto.",
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(help="Leave layers with a matching name, like '*.down_proj' or 'layers.0.*', in floating point."),
]
Only = Annotated[list[str] | None, typer.Option(help="Quantize only layers with a matching name.")]
StoredDtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Dtype of embeddings, norms and everything else in floating point: float32, float16 or bfloat16. auto: "
        "the checkpoint's dtype; of a language model that has 32 bits bfloat16.",
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
        help=f"{', '.join(SCHEMES)}. Activations have one scale per token, computed at run time. With -static they "
        "have one scale per layer, from calibration, which is less accurate.",
    ),
]
