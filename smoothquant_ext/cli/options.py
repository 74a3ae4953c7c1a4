"""The options of the commands: what each is called and what ``--help`` says of it."""

from __future__ import annotations

from typing import Annotated

import typer

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
        help="How much of the outliers moves from the activations into the weights, 0 to 1. "
        "Default: 0.5, for int8-static 0.8.",
    ),
]
AlphaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        help="How much of the outliers moves from the activations into the weights, 0 to 1. Default: 0.5, for "
        "int8-static 0.8. auto: searches the best for each group of layers, on the real kernels, and rounds weights by "
        "GPTQ; more accurate, takes minutes, and goes on where it stopped if it was cut off.",
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
        help="compressed-tensors, which vLLM, SGLang and transformers read, or lmdeploy. auto: the former, or the one "
        "that can store the model: lmdeploy for fp8-e5m2, smoothquant-ext for --explicit.",
    ),
]
