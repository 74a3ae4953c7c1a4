"""Writes docs/kv-cache.md from what kv_cache.py measured: benchmarks/results/kv-cache-smollm2-135m.json."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "kv-cache-smollm2-135m.json"

INTRODUCTION = """# INT8 cache of keys and values

What a model remembers of a text, the keys and values of every token, can be kept in INT8 instead of bf16. A head of D
elements then takes D + 4 bytes a token instead of 2 D. It is an option, since it costs some accuracy:

```python
from smoothquant_ext import Int8Cache, load, use_int8_cache_

model = load("smol-w8a8")
handle = use_int8_cache_(model)  # generate, and calls without gradients, start INT8 caches; handle.remove() undoes it
model.generate(ids, cache=Int8Cache(model.config))  # or only here; the argument was past_key_values before
```

On the command line it is `smoothquant generate smol-w8a8 "Once upon a time" --kv-cache int8`.

- Every head of every token has its own fp32 scale, `absmax / 127`, as `quantize_per_token` makes it, and is quantized
  once, when it is appended. Its rounding error is at most half a scale, and no later token can make it worse.
- Attention reads the integers as they lie: scores are multiplied by the keys' scales, probabilities by the values'
  scales. There is no copy in floating point, and q, softmax and sums stay in floating point. Kernels: AVX-512 (with
  bf16 products for prompts), AVX2, portable.
- New tokens are read from the cache, too, so that it does not matter in which pieces a text comes.
- It works in fused decoder layers and module by module; with sampling, beam search, assistants, prompt lookup and
  padded batches; with quantized and with floating-point models on the CPU that use this package's attention. Layers
  with a sliding window keep their few tokens in floating point. What cannot read it says so: soft caps, models that
  cache something else than keys and values (DeepSeek's latent attention), other attention implementations, gradients.
  `torch.compile` of a whole model does not get through it; the op itself compiles.

`use_int8_cache_` is a call and not one more `cache_implementation`, because transformers keeps a closed list of those.
It acts on the caches that the model starts: pipelines and servers that call `generate` need not know of it.
"""

MADE = "Made by `benchmarks/kv_cache.py`, written by `benchmarks/write_kv_cache.py`.\n"


def main() -> None:
    """Writes the page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = [INTRODUCTION, *accuracy(found["model"], found["accuracy"]), *speed(found["speed"]), MADE]
    (ROOT / "docs" / "kv-cache.md").write_text("\n".join(parts), encoding="utf-8")


def prose(*pieces: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(pieces), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def accuracy(model: str, found: dict[str, Any]) -> list[str]:
    """What it costs."""
    measured, (windows, length) = found["results"], found["windows"]
    prompt, chunk, single = (found["pieces"].count(size) for size in (256, 64, 1))
    rows = [f"| {name} | {cells(own['float32'])} |" for name, own in measured.items()]
    pure, base, int8 = (measured[f"{name} cache"]["float32"] for name in ("float32, int8", "W8A8, bf16", "W8A8, int8"))
    apart, control = (measured[f"W8A8, {name}"]["W8A8, bf16 cache"] for name in ("int8 cache", "no cache"))
    weights = measured["8-bit weights only, int8 cache"]["8-bit weights only"]
    return [
        "## Accuracy\n",
        prose(
            f"{model}, on {pure['tokens']:,} predicted tokens of speeches of 2010 and later: {windows}",
            f"windows of {length}. Every token went through the cache, in {prompt} piece of 256, {chunk} of 64 and",
            f"{single} single tokens. Compared with the float32 model: KL divergence in nats a token,",
            "with its standard error over windows.",
        ),
        "| model | KL | perplexity | change | same top-1 |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        prose(
            f"The INT8 cache by itself costs {pure['kl']:.4f} nats; it takes the W8A8 model's divergence from",
            f"{base['kl']:.4f} to {int8['kl']:.4f}, and changes its perplexity by {100 * apart['change']:+.2f} %",
            f"±{100 * apart['change_error']:.2f}. Side by side, the two W8A8 models diverge by {apart['kl']:.4f}",
            f"±{apart['kl_error']:.4f} nats and agree on the likeliest token in {100 * apart['top1']:.1f} %. That",
            "is the rounding of activations: a small change sends many of them to the other side, and so draws the",
            "error of W8A8 anew. With the same 8-bit weights and products in floating point, the cache makes",
            f"{weights['kl']:.4f}; roundings of bf16 alone, with its cache or without one, make {control['kl']:.4f}.",
            "Other models were not measured; keys with a few much larger channels, as some have, are likely to lose",
            "more.",
        ),
        about(found),
    ]


def cells(evaluation: dict[str, Any]) -> str:
    """One row's numbers."""
    e = evaluation
    change = f"{100 * e['change']:+.2f} % ±{100 * e['change_error']:.2f}"
    return f"{e['kl']:.5f} ±{e['kl_error']:.5f} | {e['perplexity']:.3f} | {change} | {100 * e['top1']:.1f} %"


def speed(found: dict[str, Any]) -> list[str]:
    """What it saves."""
    bf16, int8 = (found["bytes_per_token"][kind] for kind in ("bf16", "int8"))
    shape = found["attention_shape"]
    return [
        "## Memory and speed\n",
        prose(
            f"A token takes {int8:,.0f} bytes instead of {bf16:,.0f}, {int8 / bf16:.2f} of them. Milliseconds a step",
            "of decoding:",
        ),
        *table(found["decode_seconds"]),
        "",
        prose(
            f"Attention alone, milliseconds a layer of an 8B model's shape ({shape['heads']} heads on",
            f"{shape['kv_heads']}, {shape['head_dim']} elements each), with keys and values that",
            "are in no cache of the processor:",
        ),
        *table(found["attention_seconds"]),
        "",
        prose(
            f"Both kinds took turns in every round; these are medians over {found['rounds']} rounds, of",
            f"{found['steps']} tokens each in the first table. Other work shared the machine: ratios are worth more",
            "than times. In this small model weights and arithmetic take most of a step. VNNI's integer products are",
            "not used: they would want q rounded, too.",
        ),
        about(found),
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians of both kinds and their ratio."""
    lines = ["| batch | context | bf16 | int8 | faster |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        bf16, int8 = row["median"]["bf16"], row["median"]["int8"]
        times = f"{1e3 * bf16:.2f} | {1e3 * int8:.2f} | {bf16 / int8:.2f} times"
        lines.append(f"| {row['batch']} | {row['context']} | {times} |")
    return lines


def about(found: dict[str, Any]) -> str:
    """What it was measured with."""
    machine = dict(found["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("versions").items())
    return prose(f"Measured with: {', '.join(f'{name} {value}' for name, value in machine.items())}; {versions}.")


if __name__ == "__main__":
    main()
