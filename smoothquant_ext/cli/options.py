"""The options of the commands: names and help texts."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model: a directory, a hub id or a GGUF file.")]
Served = Annotated[
    str, typer.Argument(metavar="MODEL", help="The model: a directory or a hub id; W8A8 runs on 8-bit kernels.")
]
Device = Annotated[str, typer.Option(help="The device: cpu, or a GPU such as cuda:0.")]
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
        "Text like the text the model will read later works best.",
    ),
]
Samples = Annotated[int, typer.Option(help="Number of windows, spread evenly over the text.", min=1)]
Seqlen = Annotated[int, typer.Option(help="Tokens in each window.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed of the windows' positions; the same seed gives the same windows.")]
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
        help="How far smoothing moves outliers from activations to weights, 0 to 1. Default: 0.5; int8-static: 0.8.",
    ),
]
AlphaOrAuto = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|auto",
        help="How far smoothing moves outliers from activations to weights, 0 to 1. Default: 0.5; int8-static: 0.8. "
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
        help="Rounding of weights: nearest, clip or gptq. Default: nearest; with --alpha auto: gptq.",
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
        "the checkpoint's dtype if that has 16 bits, else bfloat16.",
    ),
]
StoredFormat = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="compressed-tensors (read by vLLM, SGLang and transformers), lmdeploy or smoothquant-ext. auto: "
        "compressed-tensors, but lmdeploy for fp8-e5m2 and smoothquant-ext for --explicit.",
    ),
]
