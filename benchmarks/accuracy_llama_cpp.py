"""Quantizes GGUF files with llama.cpp and serves their logits, to compare its Q8_0 on the same test windows.

llama.cpp has an environment of its own, because pip compiles it. This script imports nothing of this package:

    python3 -m venv .venv-llama-cpp
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" .venv-llama-cpp/bin/pip install llama-cpp-python==0.3.36 typer
    .venv-llama-cpp/bin/python benchmarks/accuracy_llama_cpp.py quantize MODEL.gguf OUT.gguf Q8_0

`serve` is for benchmarks/accuracy.py, which reads the logits with served_model.py.
"""

from __future__ import annotations

import importlib.util
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import logits_server
import numpy as np
import numpy.typing as npt
import typer

if importlib.util.find_spec("llama_cpp") is None:
    raise SystemExit(f"{sys.executable} has no llama-cpp-python: see the top of {Path(__file__).name}")

import llama_cpp as lib

app = typer.Typer(add_completion=False)


@lib.llama_log_callback
def only_warnings(level: int, text: bytes, _: Any) -> None:
    """Hides what llama.cpp says of every tensor."""
    if level in (3, 4):  # GGML_LOG_LEVEL_WARN and GGML_LOG_LEVEL_ERROR; the binding's own filter has other numbers
        print(text.decode(errors="replace"), end="", file=sys.stderr)


lib.llama_log_set(only_warnings, None)


class Kind(str, Enum):
    """What a GGUF file stores: the types of llama.cpp that are compared."""

    F32 = "F32"
    Q8_0 = "Q8_0"  # blocks of 32 with a scale in float16; llama.cpp quantizes activations likewise


FILE_TYPES = {Kind.F32: lib.LLAMA_FTYPE_ALL_F32, Kind.Q8_0: lib.LLAMA_FTYPE_MOSTLY_Q8_0}


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A GGUF file; of any type, since it is dequantized first.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")],
    kind: Annotated[Kind, typer.Argument(help="Its type.")],
    threads: Annotated[int, typer.Option(help="How many threads quantize.")] = 1,
) -> None:
    """Writes a GGUF file of another type, as llama-quantize does."""
    if not source.is_file():
        raise typer.BadParameter(f"{source} does not exist: name a GGUF file")
    unfinished = target.with_name(f".{target.name}.unfinished")
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize, parameters.nthread = FILE_TYPES[kind], True, threads
    status = lib.llama_model_quantize(str(source).encode(), str(unfinished).encode(), parameters)
    if status:
        raise SystemExit(f"llama.cpp could not make {kind.value} of {source} (status {status})")
    unfinished.rename(target)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    tokens: Annotated[int, typer.Option(help="The most tokens of a window.")] = 512,
    threads: Annotated[int, typer.Option(help="How many threads compute.")] = 1,
) -> None:
    """Answers windows on stdin with logits on stdout, as logits_server.py describes."""
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp cannot load {model}")
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    parameters.n_threads = parameters.n_threads_batch = threads
    context = lib.llama_init_from_model(loaded, parameters)
    if not context:
        raise SystemExit(f"llama.cpp cannot make a context of {tokens} tokens for {model}")
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    batch = lib.llama_batch_init(tokens, 0, 1)
    logits_server.serve(vocabulary, lambda window: decode(context, batch, window, vocabulary))


def decode(context: Any, batch: Any, window: npt.NDArray[np.int32], vocabulary: int) -> npt.NDArray[np.float32]:
    """Logits, float32 [T, V], of all positions of one window that starts with an empty cache."""
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    batch.n_tokens = len(window)
    for position, token in enumerate(window.tolist()):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
        batch.logits[position] = True
    if status := lib.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp failed on a window of {len(window)} tokens (status {status})")
    found = lib.llama_get_logits(context)
    return np.ctypeslib.as_array(found, shape=(len(window) * vocabulary,)).reshape(len(window), vocabulary)


if __name__ == "__main__":
    app()
