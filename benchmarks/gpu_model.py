"""Times whole models on a GPU, 8-bit beside bf16, eager and compiled; writes JSON lines as it measures.

    python benchmarks/gpu_model.py OUT.jsonl [--shapes smol,8b] [--schemes int8,fp8] [--seconds 500]

Models have random weights in the shapes of SmolLM2-135M and Llama-3-8B: speed does not depend on values. "eager" runs
the modules, "static" decodes from a static cache in transformers' CUDA graphs. Rates are medians of rounds in which all
models of a shape take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from smoothquant_ext import Recipe, quantize, use_static_cache_
from smoothquant_ext.evaluation.speed import measure_speed

SHAPES: dict[str, dict[str, int]] = {
    "smol": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
BATCHES = (1, 8, 64)
PROMPT, ANSWER, ROUNDS = 512, 64, 3
POSITIONS = 4096
DEVICE = "cuda"

Record = dict[str, Any]


def build(shape: str) -> PreTrainedModel:
    """A bf16 model with random weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=POSITIONS, tie_word_embeddings=shape == "smol")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def build_all(shape: str, schemes: list[str]) -> dict[str, PreTrainedModel]:
    """The bf16 model and one of each scheme."""
    models = {"bf16": build(shape)}
    for scheme in schemes:
        model = build(shape)
        windows = torch.randint(SHAPES[shape]["vocab_size"], (4, 64))
        models[scheme] = quantize(model, windows.to(DEVICE), Recipe(scheme=scheme, alpha=0.5), progress=False)
    return models


def eager(shape: str, models: dict[str, PreTrainedModel]) -> Iterator[Record]:
    """Prefill and decoding, module by module or layer by layer."""
    for batch in BATCHES:
        speeds = measure_speed(models, PROMPT, ANSWER, ROUNDS, batch)
        for name, speed in speeds.items():
            rates = {"prefill": speed.prefill, "decode": speed.decode}
            yield {"shape": shape, "model": name, "mode": "eager", "batch": batch, "tokens_per_second": rates}


def static(shape: str, models: dict[str, PreTrainedModel]) -> Iterator[Record]:
    """Decoding from a static cache; the rate of the tokens after the first."""
    for model in models.values():
        use_static_cache_(model)
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(ROUNDS + 1):
            for name, model in models.items():
                taken = answer_seconds(model, batch, ANSWER) - answer_seconds(model, batch, 1)
                if turn:  # the first round compiles
                    seconds[name].append(taken)
        for name, each in seconds.items():
            rates = {"decode": batch * (ANSWER - 1) / statistics.median(each)}
            yield {"shape": shape, "model": name, "mode": "static", "batch": batch, "tokens_per_second": rates}


def answer_seconds(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """Seconds of ``generate`` for so many tokens after a prompt."""
    prompt = torch.randint(100, (batch, PROMPT), device=DEVICE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate: Any = model.generate  # type: ignore[operator]
    generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shapes: list[str], schemes: list[str]) -> Iterator[Record]:
    """Every record, the quickest first."""
    for shape in shapes:
        models = build_all(shape, schemes)
        yield from eager(shape, models)
        yield from static(shape, models)
        del models
        torch.cuda.empty_cache()


def main() -> int:
    """Measures until everything is done or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shapes", default="smol,8b", help="which, of smol and 8b")
    parser.add_argument("--schemes", default="int8,fp8", help="which, besides bf16")
    parser.add_argument("--seconds", type=float, default=500.0, help="stop after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_model: torch sees no GPU here; 'smoothquant info' says why", file=sys.stderr)
        return 2
    started = time.monotonic()
    with arguments.output.open("w") as file:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        print(json.dumps(about), file=file, flush=True)
        for record in measure(arguments.shapes.split(","), arguments.schemes.split(",")):
            print(json.dumps(record), file=file, flush=True)
            print(record, flush=True)
            if time.monotonic() - started > arguments.seconds:
                print(f"gpu_model: stopped after {arguments.seconds:.0f} s", file=sys.stderr)
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
