"""Times the experts of one layer in the shape of Qwen3-30B-A3B: this package in INT8, transformers in bf16.

    python benchmarks/experts.py --output benchmarks/results/experts.json

The layer has 128 experts, 8 for each token, hidden size 2048 and inner size 768. Weights and routing are random. Every
call has another routing, so that weights come from memory as in a model, where other layers run in between. Methods
take turns; times are medians. batched_mm copies the weights of every token's experts and is left out if memory is too
small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from machine import describe, write_results
from rich.console import Console
from torch import Tensor, nn
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from smoothquant_ext import SCHEMES
from smoothquant_ext.probing.experts import match_experts_layout
from smoothquant_ext.quantization.convert import quantize_experts

SHAPE = {"num_experts": 128, "hidden_size": 2048, "moe_intermediate_size": 768}
SLOTS, TOKENS = 8, (1, 16, 512)
BATCHED_UP_TO = 16  # tokens
SECONDS = 4.0  # of each method and number of tokens, at least 3 calls
out = Console(width=100)


@torch.no_grad()
def main(
    output: Annotated[Path | None, typer.Option(help="Write the raw results as JSON.")] = None,
    seconds: Annotated[float, typer.Option(help="For each method and number of tokens.")] = SECONDS,
) -> None:
    """Times the experts of one layer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPE, experts_implementation="eager")
    module = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in module.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    layout = match_experts_layout(module)
    assert layout is not None
    ours = quantize_experts(module, layout, SCHEMES["int8"])
    methods: dict[str, Callable[..., Tensor]] = {"ours, INT8": ours} | {
        name: _with_implementation(module, name) for name in ("eager", "grouped_mm", "batched_mm")
    }
    facts = describe()
    results = {}
    for tokens in TOKENS:
        own = {name: run for name, run in methods.items() if name != "batched_mm" or tokens <= BATCHED_UP_TO}
        x = torch.randn(tokens, SHAPE["hidden_size"], dtype=torch.bfloat16)
        errors = _errors(own, x)
        times: dict[str, list[float]] = {name: [] for name in own}
        start = time.perf_counter()
        while time.perf_counter() - start < seconds * len(own) or len(times["ours, INT8"]) < 3:
            chosen = _routing(tokens)
            for name, run in own.items():
                before = time.perf_counter()
                run(x, *chosen)
                times[name].append(time.perf_counter() - before)
        results[str(tokens)] = {
            name: {"ms": statistics.median(taken) * 1e3, "calls": len(taken), "error": errors[name]}
            for name, taken in times.items()
        }
    found = {"machine": facts, "shape": SHAPE | {"slots": SLOTS}, "tokens": results}
    if output is not None:
        write_results(output, found)
    threads, versions = facts["threads"], facts["versions"]
    out.print(f"{facts['cpu']}, {threads} threads, {facts['cpu_isa']}; torch {versions['torch']}, {facts['date']}")
    out.print(f"| tokens | {' | '.join(methods)} | over the fastest |", soft_wrap=True)
    out.print(f"|---:|{'---:|' * (len(methods) + 1)}", soft_wrap=True)
    for tokens, row in results.items():
        cells = [f"{row[name]['ms']:.2f}" if name in row else "" for name in methods]
        fastest = min(entry["ms"] for name, entry in row.items() if not name.startswith("ours"))
        out.print(f"| {tokens} | {' | '.join(cells)} | {fastest / row['ours, INT8']['ms']:.1f} |", soft_wrap=True)


def _with_implementation(module: nn.Module, name: str) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        module.config._experts_implementation = name
        result: Tensor = module(*arguments)
        return result

    return run


def _routing(tokens: int) -> tuple[Tensor, Tensor]:
    scores, index = torch.rand(tokens, SHAPE["num_experts"]).topk(SLOTS, dim=-1)
    return index, (scores / scores.sum(-1, keepdim=True)).to(torch.bfloat16)


def _errors(methods: dict[str, Callable[..., Tensor]], x: Tensor) -> dict[str, float]:
    """Relative errors against transformers' eager implementation; these calls also warm up."""
    chosen = _routing(len(x))
    expected = methods["eager"](x, *chosen).float()
    return {name: float((run(x, *chosen).float() - expected).norm() / expected.norm()) for name, run in methods.items()}


if __name__ == "__main__":
    typer.run(main)
