"""Serves the logits of a compressed-tensors checkpoint as its own libraries compute them: with fake quantization.

benchmarks/accuracy.py runs it, in the environment that accuracy_peer.py describes, for checkpoints that are rotated at
run time. transformers does not read their ``transform_config``: it is applied here, by compressed-tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
os.environ.setdefault("TQDM_DISABLE", "1")

import logits_server
import numpy as np
import numpy.typing as npt
import torch
import typer
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

AT_RUN_TIME = ("input", "output")  # transforms at other locations are in the weights


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A compressed-tensors checkpoint.")],
    threads: Annotated[int, typer.Option(help="How many threads compute.")] = 1,
) -> None:
    """Answers windows on stdin with logits on stdout, as logits_server.py describes."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    transform_(model, checkpoint)

    @torch.no_grad()
    def logits(window: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        tokens = torch.from_numpy(window.astype(np.int64))[None]
        return model(input_ids=tokens, use_cache=False).logits[0].float().numpy()  # type: ignore[no-any-return]

    logits_server.serve(model.get_output_embeddings().out_features, logits)


def transform_(model: nn.Module, checkpoint: Path) -> None:
    """Adds the transforms of a checkpoint that are made at run time, with the matrices that it stores."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    transforms = TransformConfig.model_validate(config.get("transform_config") or {"config_groups": {}})
    for scheme in transforms.config_groups.values():
        scheme.apply = [each for each in scheme.apply if each.location in AT_RUN_TIME]
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    apply_transform_config(model, transforms)
    matrices = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in weights}
    stored = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    filled = {id(matrices[name]) for name in matrices.keys() & stored.keys()}
    if missing := sorted(name for name, matrix in matrices.items() if id(matrix) not in filled):
        raise SystemExit(f"{checkpoint} does not store the matrix {missing[0]}, which its transform_config needs")
    for name in matrices.keys() & stored.keys():
        matrices[name].data = stored[name].float()  # of +1 and -1, kept in float64


if __name__ == "__main__":
    typer.run(main)
