"""Times whole models: reading a prompt and answering, ours beside transformers in bf16 and fp32.

All models take turns in one run; a number is the median of the rounds. Give a quantized directory and its original, or
name an architecture below, which is made with random weights: speed does not depend on their values.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import describe, write_results
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from smoothquant_ext import Recipe, load, quantize
from smoothquant_ext.evaluate import Speed, measure_speed
from smoothquant_ext.models import load_model

# TinyLlama 1.1B and Llama 3.2 1B, from their papers and model cards.
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}
OURS, BASELINE = "ours int8", "transformers bf16"

out, err = Console(width=120), Console(stderr=True)


def main(
    shape: Annotated[str, typer.Option(help=f"A model with random weights: {', '.join(SHAPES)}.")] = "",
    original: Annotated[str, typer.Option(help="A real model: its directory, hub id or GGUF file.")] = "",
    quantized: Annotated[Path | None, typer.Option(help="The same, quantized by smoothquant.")] = None,
    batches: Annotated[str, typer.Option(help="Prompts at once, separated by commas.")] = "1,8",
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    decode: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds to take the median of.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="torch's threads.", min=1)] = 2,
    fp32: Annotated[bool, typer.Option(help="Time transformers in fp32 as well.")] = False,
    output: Annotated[Path | None, typer.Option(help="Where the raw results go, as JSON.")] = None,
) -> None:
    """Tokens per second of prompt and of answer."""
    if (shape in SHAPES) == bool(original and quantized):
        raise typer.BadParameter(f"give --shape, one of {', '.join(SHAPES)}, or both --original and --quantized")
    torch.set_num_threads(threads)
    models = random_models(SHAPES[shape], fp32) if shape else real_models(original, quantized, fp32)
    machine = describe()
    rows = []
    for batch in map(int, batches.split(",")):
        speeds = measure_speed(models, prefill, decode, rounds, batch, progress=True)
        rows.append({"batch": batch, "methods": {name: asdict(speed) for name, speed in speeds.items()}})
        out.print(table(batch, speeds))
    if output is not None:
        write_results(output, {"machine": machine, "model": shape or Path(original).name, "rows": rows})


def random_models(shape: dict[str, Any], fp32: bool) -> dict[str, Any]:
    """A Llama of this shape with random weights: ours, in bf16 and perhaps in fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    models = {OURS: quantize(copy_of(model), torch.randint(1000, (1, 16)), Recipe("int8", smooth=False))}
    return models | {BASELINE: model} | ({"transformers fp32": copy_of(model).float()} if fp32 else {})


def copy_of(model: Any) -> Any:
    copy = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def real_models(original: str, quantized: Path | None, fp32: bool) -> dict[str, Any]:
    """A quantized model and its original."""
    models = {OURS: load(quantized), BASELINE: load_model(original, torch.bfloat16)[0]}
    return models | ({"transformers fp32": load_model(original, torch.float32)[0]} if fp32 else {})


def table(batch: int, speeds: dict[str, Speed]) -> Table:
    """Tokens per second, and their ratios to the baseline's."""
    one = next(iter(speeds.values()))
    result = Table(title=f"batch {batch}: {one.prompt} tokens of prompt, {one.generated} of answer; tokens per second")
    for heading in ("", "prompt", "over bf16", "answer", "over bf16"):
        result.add_column(heading, justify="right")
    base = speeds[BASELINE]
    for name, speed in speeds.items():
        ratios = f"{speed.prefill / base.prefill:.2f}", f"{speed.decode / base.decode:.2f}"
        result.add_row(name, f"{speed.prefill:.0f}", ratios[0], f"{speed.decode:.1f}", ratios[1])
    return result


if __name__ == "__main__":
    typer.run(main)
