"""The commands that write checkpoints: quantize, convert."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .console import out, step
from .options import (
    AlphaOrAuto,
    AsW8A8,
    AutoSkip,
    Calib,
    CalibrationSamples,
    Clipping,
    Device,
    Drop,
    Explicit,
    Fast,
    HeadBits,
    MaxPplIncrease,
    Model,
    NoSmooth,
    Only,
    Rotate,
    Rounding,
    SchemeName,
    Seed,
    Seqlen,
    Skip,
    StoredDtype,
    StoredFormat,
    Task,
    TextField,
)
from .support import (
    CALIBRATION_TEXT,
    TEST_SAMPLES,
    add_to_card,
    choose,
    load,
    measure_all,
    name_of_text,
    parse_count_or_share,
    parse_device,
    parse_dtype,
    parse_number,
    quoted,
    read_data,
    show,
    stored_dtype,
)


def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write; new, empty or a W8A8 checkpoint.")
    ],
    scheme: SchemeName = "int8",
    alpha: AlphaOrAuto = None,
    no_smooth: NoSmooth = False,
    explicit: Explicit = False,
    auto_skip: AutoSkip = None,
    max_ppl_increase: MaxPplIncrease = None,
    rounding: Rounding = None,
    clipping: Clipping = None,
    rotate: Rotate = None,
    head: HeadBits = None,
    fast: Fast = False,
    calib: Calib = CALIBRATION_TEXT,
    samples: CalibrationSamples = None,
    seqlen: Seqlen = 512,
    text_field: TextField = None,
    task: Task = None,
    skip: Skip = None,
    only: Only = None,
    device: Device = "auto",
    dtype: StoredDtype = "auto",
    format: StoredFormat = "auto",  # noqa: A002
    drop: Drop = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Also compare the result with MODEL on this text (64 windows), and write the numbers into the model "
            "card. Give another text than for --calib.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Smooths a model, quantizes it to 8 bits and saves it.

    Example: [bold]smoothquant quantize HuggingFaceTB/SmolLM2-135M -o smol-w8a8 --calib my_text.txt[/bold]

    Calibration needs a few thousand tokens of text. The command probes the
    model to find which layers can be smoothed, and undoes a change that alters
    the output. Expert routers stay in floating point.
    """
    from ..checkpoint import saving
    from ..checkpoint.formats.base import EXPERTS, LAYERS
    from ..checkpoint.formats.compressed_tensors import Smoothed
    from ..checkpoint.formats.registry import choose_format, written_formats
    from ..checkpoint.hf_names import cast_
    from ..inputs import enough_samples
    from ..models import local_directory
    from ..probing.experts import looks_like_experts
    from ..quantization.pipeline import quantize as quantize_
    from ..quantization.recipe import AUTO, FLOAT, Recipe
    from ..quantization.rotation_choice import ROTATED_DTYPES
    from ..reporting.tables import render_report
    from ..traits import predicts_next_token

    if rounding is None and scheme.startswith("int8") and not fast:
        rounding = "gptq"
    named = choose("format", format, ("auto", *written_formats()))
    if rotate is None:
        is_ours = named in (None, Smoothed.name) and scheme == "int8" and not explicit
        kinds = "inputs" if is_ours else "none" if fast else "residual,heads"
        rotate = kinds if fast else f"{kinds},{AUTO}"
    recipe = Recipe(
        scheme,
        alpha if alpha is None or alpha == AUTO else parse_number("alpha", alpha),
        not no_smooth,
        explicit,
        cast(Any, rounding),
        cast(Any, clipping),
        0 if auto_skip is None else parse_count_or_share("auto-skip", auto_skip),
        None if max_ppl_increase is None else parse_number("max-ppl-increase", max_ppl_increase),
        rotate,
        cast(Any, FLOAT if head is None else head),
        tuple(skip or ()),
        tuple(only or ()),
    )
    is_tried = recipe.resolved_scheme.dtype in ROTATED_DTYPES or not recipe.chooses_rotation
    rotated = [LAYERS] if is_tried and {"down", "inputs"} & set(recipe.rotations) else []
    # Refuses now, not after the work.
    chosen = choose_format(named, [recipe.resolved_scheme], explicit, rotated, shared=recipe.head != FLOAT).name
    stored, where = parse_dtype(dtype), parse_device(device)
    target = saving.check_destination(output)

    start = time.perf_counter()
    loaded = network, processor = load(model, drop=drop, task=task)
    files_from = None if Path(model).is_file() else local_directory(model)
    if rotated and any(looks_like_experts(module) for module in network.modules()):
        choose_format(named, [recipe.resolved_scheme], explicit, [*rotated, EXPERTS])
    if head is None and chosen == Smoothed.name and predicts_next_token(network):
        recipe = replace(recipe, head="auto")
    count = enough_samples(network, seqlen) if samples is None else samples
    data = read_data(loaded, calib, count, seqlen, seed, text_field)
    tests = None if test is None else read_data(loaded, test, TEST_SAMPLES, seqlen, seed)
    journal = target.with_name(f".{target.name}.search")
    quantize_(network, data, recipe, journal=journal, device=where)
    cast_(network, stored_dtype(network, stored))
    network.smoothquant_record["calibration"]["text"] = name_of_text(calib)
    with step(f"Saving to {output}"):
        saving.save(network, output, processor, chosen if named or explicit else None, files_from=files_from)
    shutil.rmtree(journal, ignore_errors=True)  # what interrupted runs with other options left there

    out.print(render_report(network.smoothquant_report))
    files = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    out.print(f"Saved to {output}: {files / 1e6:.1f} MB of weights, {time.perf_counter() - start:.0f} s in total.")
    if tests is not None:
        original, _ = load(model, network.dtype, network.device, drop, task)
        measured = measure_all({model: original, output.name: network}, tests, original)
        show(measured, as_json=False)
        add_to_card(output, str(test), measured)
    if named is None and predicts_next_token(network) and Smoothed().recognizes(network.config.quantization_config):
        out.print(
            "It is for smoothquant-ext alone. For vLLM, SGLang and plain transformers quantize with "
            "--format compressed-tensors, for LMDeploy with --format lmdeploy.",
            soft_wrap=True,
        )
    out.print("Next:", style="bold")
    text = "" if calib == CALIBRATION_TEXT else f" --text {quoted(calib)}"
    text += "" if text_field is None else f" --text-field {quoted(text_field)}"
    out.print(f"  smoothquant compare {quoted(model)} {quoted(output)}{text}", soft_wrap=True, highlight=False)
    if predicts_next_token(network):
        out.print(f'  smoothquant generate {quoted(output)} "Once upon a time"', soft_wrap=True, highlight=False)


def convert(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A W8A8 checkpoint: a directory or a hub id.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Directory to write; new, empty or a W8A8 checkpoint.")
    ],
    format: StoredFormat = "auto",  # noqa: A002
    drop: Drop = None,
    as_w8a8: AsW8A8 = False,
) -> None:
    """Writes a W8A8 checkpoint from any tool in another format, without rounding again.

    Example: [bold]smoothquant convert smol-ct -o smol-lmdeploy --format lmdeploy[/bold]

    Reads compressed-tensors, the formats of LMDeploy, SGLang, Quark and Ascend, and the FP8 formats of vLLM,
    transformers, FBGEMM and ModelOpt. Tensors that the model's class does not know, such as layers for multi-token
    prediction, and other files go along.
    """
    from ..checkpoint import converting
    from ..checkpoint.completeness import name_families
    from ..checkpoint.formats.registry import written_formats
    from ..models import local_directory

    chosen = choose("format", format, ("auto", *written_formats()))
    directory = local_directory(source)
    with step(f"Converting {source}"):
        done = converting.convert(directory, output, chosen, drop=drop or (), as_w8a8=as_w8a8)
    for names, what in ((done.unknown, "copied as they are"), (done.dropped, "dropped")):
        if names:
            count = f"{len(names)} tensors" if len(names) > 1 else "1 tensor"
            out.print(f"{count} that the model's class does not know: {what}: {name_families(names)}.", soft_wrap=True)
    if done.left_out:
        out.print(
            f"Not copied, because they are other weights or tools' own: {', '.join(done.left_out)}.", soft_wrap=True
        )
    out.print(f"{done.layers} layers in 8 bits, unchanged, saved to {output}.", soft_wrap=True)
