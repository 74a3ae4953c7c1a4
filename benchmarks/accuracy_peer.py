"""Makes a W8A8 checkpoint with llm-compressor, to compare its accuracy on the same calibration windows.

llm-compressor pins other versions of transformers and compressed-tensors than this package, so it needs a separate
environment. This script imports nothing of this package:

    python3 -m venv .venv-llmc
    .venv-llmc/bin/pip install torch==2.13.0  # first, or pip takes the newest that llm-compressor allows
    .venv-llmc/bin/pip install llmcompressor==0.14.0.1 typer
    .venv-llmc/bin/python benchmarks/accuracy_peer.py MODEL_DIR TOKENS.safetensors OUT_DIR --recipe smoothquant-gptq

The checkpoint is in the compressed-tensors format, which ``smoothquant_ext.load`` reads.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sys
import time
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

# Read by the libraries when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"  # everything is given as a file: nothing may come from elsewhere unnoticed
os.environ.setdefault("TQDM_DISABLE", "1")  # two bars for every layer
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # until `only_warnings`
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # what llm-compressor would set, with a warning

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

MODEL_FILES = (".json", ".jinja", ".model", ".txt")  # suffixes of what belongs to a model besides its weights


class Recipe(str, Enum):
    """The recipes of llm-compressor."""

    RTN = "smoothquant-rtn"  # rounding to nearest, as ours
    GPTQ = "smoothquant-gptq"  # as many published W8A8 checkpoints were made
    SPINQUANT = "spinquant-r1-r2-gptq"  # rotations that are folded into the weights
    SPINQUANT_R4 = "spinquant-r1-r2-r4-gptq"  # and one of down_proj's input at run time
    QUIP = "quip-gptq"  # rotations of the input of every layer at run time


def main(
    model_dir: Annotated[Path, typer.Argument(help="A causal LM in floating point, as save_pretrained writes it.")],
    tokens: Annotated[Path, typer.Argument(help="A safetensors file with one int64 tensor, windows: samples x T.")],
    out_dir: Annotated[Path, typer.Argument(help="Folder for the checkpoint; new or empty.")],
    recipe: Annotated[Recipe, typer.Option(help="What its modifiers do, in order.")],
) -> None:
    """Quantizes a model with llm-compressor to INT8: a scale per output channel, and per token at run time."""
    if importlib.util.find_spec("llmcompressor") is None:
        raise typer.BadParameter(f"{sys.executable} has no llm-compressor: see the top of {Path(__file__).name}")
    if not (model_dir / "config.json").is_file():
        raise typer.BadParameter(f"{model_dir} holds no config.json: name a model's directory")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise typer.BadParameter(f"{out_dir} exists already: remove it or name another place")
    windows = read_windows(tokens)
    start = time.perf_counter()
    quantize(model_dir, windows, recipe, out_dir)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(f"{out_dir}: {recipe.value} on {list(windows.shape)} tokens, {seconds:.0f} s, {memory:.1f} GiB at most")
    print(", ".join(f"{package} {version(package)}" for package in packages))


def read_windows(path: Path) -> Tensor:
    """The calibration windows, int64 [samples, T]."""
    if not path.is_file():
        raise typer.BadParameter(f"{path} does not exist: name a safetensors file")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise typer.BadParameter(f"{path} is not a safetensors file ({error})") from error
    if list(tensors) != ["windows"]:
        raise typer.BadParameter(f"{path} must hold one tensor named windows, and holds {sorted(tensors)}")
    windows = tensors["windows"]
    if windows.dtype != torch.int64 or windows.ndim != 2 or not windows.numel():
        given = f"{windows.dtype} {list(windows.shape)}"
        raise typer.BadParameter(f"windows in {path} must be torch.int64 [samples, T] and not empty, and is {given}")
    return windows


def quantize(model_dir: Path, windows: Tensor, recipe: Recipe, out_dir: Path) -> None:
    """Runs the recipe and writes the checkpoint, with the original's tokenizer."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    only_warnings()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise typer.BadParameter(f"the windows hold tokens that {model_dir} does not know: it has {vocabulary}")
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    # Left to itself, llm-compressor loads the tokenizer, which its transformers may be too old for. Nothing needs it:
    # False counts as given, and is used only where there is text to tokenize, or by `output_dir`.
    oneshot(model=model, processor=False, dataset=DataLoader(samples), recipe=modifiers(recipe))
    model.save_pretrained(out_dir, save_compressed=True)
    for file in model_dir.iterdir():
        if file.name.endswith(MODEL_FILES) and not file.name.endswith(".index.json") and file.is_file():
            target = out_dir / file.name
            if not target.exists():
                shutil.copyfile(file, target)


def only_warnings() -> None:
    """Hides llm-compressor's messages for every layer, but shows warnings, such as of layers that GPTQ rounded."""
    from loguru import logger

    def matters(record: Any) -> bool:  # its level METRIC lies above WARNING, and every step misses a GPU
        return record["level"].name != "METRIC" and record["function"] != "get_main_device"

    logger.remove()
    logger.add(sys.stderr, level="WARNING", filter=matters, format="{level}: {message}")


def modifiers(recipe: Recipe) -> list[Any]:
    """The steps of a recipe."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    layers: dict[str, Any] = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
    # Over the full width, which is no power of two in many models: the type "hadamard" refuses those.
    full: dict[str, Any] = {"transform_type": "random-hadamard"}
    steps = {
        Recipe.RTN: lambda: [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(**layers)],
        Recipe.GPTQ: lambda: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**layers)],
        Recipe.SPINQUANT: lambda: [SpinQuantModifier(rotations=["R1", "R2"], **full), GPTQModifier(**layers)],
        Recipe.SPINQUANT_R4: lambda: [SpinQuantModifier(rotations=["R1", "R2", "R4"], **full), GPTQModifier(**layers)],
        Recipe.QUIP: lambda: [QuIPModifier(rotations=["v"], **full), GPTQModifier(**layers)],
    }
    return steps[recipe]()


if __name__ == "__main__":
    typer.run(main)
