"""Times prompt and answer of whole models: smoothquant-ext, transformers and vLLM's CPU engine.

Each engine runs in a separate process, and they take turns in one run. A number is the median of the rounds. All
engines get the same random prompts, new ones in every round, and answer greedily. Both W8A8 engines load the same
checkpoint. The model is a real one or one of the shapes below with random weights: speed does not depend on their
values.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
import typer
from bench_ops import start
from machine import write_results
from model_workers import Compiled, Transformers, Vllm, prepare
from peers import environment
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig
from workers import Worker, WorkerError, first_cpus

from smoothquant_ext.evaluation.speed import Speed

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
FP32, COMPILED, VLLM_BF16, VLLM_INT8 = "transformers fp32", "transformers bf16 compiled", "vLLM bf16", "vLLM W8A8"
# One process for the whole engine, so that its scheduler and its model do not compete for the cores.
VLLM = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

out, err = Console(width=120), Console(stderr=True)


class Engine(NamedTuple):
    """The function that makes a model, and the environment variables of its process."""

    factory: Callable[..., object]
    arguments: tuple[object, ...]
    variables: dict[str, str]


def main(
    shape: Annotated[str, typer.Option(help=f"A model with random weights: {', '.join(SHAPES)}.")] = "",
    original: Annotated[str, typer.Option(help="A real model: its directory, hub id or GGUF file.")] = "",
    quantized: Annotated[Path | None, typer.Option(help="The model in W8A8; by default made here, unsmoothed.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    decode: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="Threads, each on a separate CPU.", min=1)] = 2,
    fp32: Annotated[bool, typer.Option("--fp32", help="Time transformers in fp32 as well.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Time transformers compiled as well: minutes.")] = False,
    vllm: Annotated[bool, typer.Option(help="Time vLLM as well.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the raw results as JSON.")] = None,
) -> None:
    """Measures tokens per second of prompt and answer."""
    if (shape in SHAPES) == bool(original):
        raise typer.BadParameter(f"give --shape, one of {', '.join(SHAPES)}, or --original")
    machine = start(threads)
    sizes = [int(batch) for batch in batches.split(",")]
    rows, skipped = [], {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        plain, int8 = Path(folder, "bf16"), quantized or Path(folder, "int8")
        Worker(prepare, plain, int8, original, SHAPES.get(shape), threads=threads).close()
        engines = {OURS: Engine(Transformers, (int8, None), {})}
        engines |= others(plain, int8, (max(sizes), prefill, decode), threads)
        left_out = {FP32: not fp32, COMPILED: not compiled, VLLM_BF16: not vllm, VLLM_INT8: not vllm}
        workers = {}
        for name, (factory, arguments, variables) in track(engines.items(), "Loading", console=err):
            if left_out.get(name):
                continue
            try:
                worker = Worker(factory, *arguments, threads=threads, environment=variables)
                workers[name] = stack.enter_context(worker)
            except WorkerError as reason:
                skipped[name] = str(reason)
                err.print(f"{name} is left out: {reason}", highlight=False)
        vocabulary = AutoConfig.from_pretrained(plain).get_text_config().vocab_size
        for batch in sizes:
            speeds = measure(workers, vocabulary, batch, prefill, decode, rounds)
            rows.append({"batch": batch, "methods": {name: asdict(speed) for name, speed in speeds.items()}})
            out.print(table(batch, speeds))
    if output is not None:
        model = shape or Path(original).name
        write_results(output, {"machine": machine, "model": model, "skipped": skipped, "rows": rows})


def others(plain: Path, int8: Path, sizes: tuple[int, int, int], threads: int) -> dict[str, Engine]:
    """The engines to compare with."""
    variables = environment("vllm", first_cpus(threads)) | VLLM
    return {
        BASELINE: Engine(Transformers, (plain, torch.bfloat16), {}),
        FP32: Engine(Transformers, (plain, torch.float32), {}),
        COMPILED: Engine(Compiled, (plain, torch.bfloat16), {}),
        VLLM_BF16: Engine(Vllm, (plain, *sizes), variables),
        VLLM_INT8: Engine(Vllm, (int8, *sizes), variables),
    }


def measure(
    workers: dict[str, Worker], vocabulary: int, batch: int, prefill: int, decode: int, rounds: int
) -> dict[str, Speed]:
    """Runs all engines in turn, in an order that rotates; the first round does not count."""
    names = list(workers)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(batch)
    for turn in track(range(rounds + 1), f"Batch {batch}", console=err):
        prompts = torch.randint(vocabulary, (batch, prefill), generator=generator).tolist()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(workers[name].call("generate", prompts, decode))
    return {name: Speed(prefill, decode, batch, *zip(*pairs[1:], strict=True)) for name, pairs in seconds.items()}


def table(batch: int, speeds: dict[str, Speed]) -> Table:
    """Prints tokens per second of every engine, and ours divided by it."""
    one = speeds[OURS]
    result = Table(title=f"batch {batch}: {one.prompt} tokens of prompt, {one.generated} of answer; tokens per second")
    for heading in ("", "prompt", "ours is", "answer", "ours is"):
        result.add_column(heading, justify="right")
    for name, speed in speeds.items():
        ratios = f"{one.prefill / speed.prefill:.2f}x", f"{one.decode / speed.decode:.2f}x"
        result.add_row(name, f"{speed.prefill:.0f}", ratios[0], f"{speed.decode:.1f}", ratios[1])
    return result


if __name__ == "__main__":
    typer.run(main)
