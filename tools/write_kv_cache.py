"""Writes docs/kv-cache.md from the results of benchmarks/kv_cache.py, benchmarks/results/kv-cache-smollm2-135m.json."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "kv-cache.md"
RESULTS = ROOT / "benchmarks" / "results" / "kv-cache-smollm2-135m.json"

INTRODUCTION = """# INT8 cache of keys and values

The cache of keys and values can be stored in INT8 instead of bf16. A head of D elements then takes D + 4 bytes a token
instead of 2 D. The INT8 cache costs some accuracy, so it is off by default.

```console
$ smoothquant generate smol-w8a8 "Once upon a time" --kv-cache int8
```

In Python:

```python
import torch
from smoothquant_ext import Int8Cache, load, use_int8_cache_

model = load("smol-w8a8")
ids = torch.tensor([[5, 6, 7]])
handle = use_int8_cache_(model)  # from now on, every new cache is INT8
model.generate(ids, max_new_tokens=8)
handle.remove()  # back to the model's default cache
model.generate(ids, max_new_tokens=8, cache=Int8Cache(model.config))  # INT8 in this call only
```

Older versions of transformers call the argument `cache` by its former name, `past_key_values`.

- Each head of each token has one fp32 scale, `absmax / 127`, as in `quantize_per_token`. A token is quantized once,
  when it is appended. Its rounding error is at most half a scale, and later tokens do not change it.
- Attention reads the integers directly: it multiplies scores by the keys' scales and probabilities by the values'
  scales. No floating-point copy is made. q, softmax and sums stay in floating point. Kernels: AVX-512 (with bf16
  products for prompts), AVX2, portable.
- Attention reads new tokens from the cache too. The result therefore does not depend on how a text is split into calls.
- Supported: fused decoder layers and separate modules; sampling, beam search, assistants, prompt lookup and padded
  batches; quantized and floating-point models that use this package's attention.
- Layers with a sliding window keep their few tokens in floating point.
- These raise an error: soft caps, models that cache something other than keys and values (DeepSeek's latent attention),
  other attention implementations, gradients.
- `torch.compile` does not compile a whole model with this cache. The attention op compiles.

`use_int8_cache_` changes the caches that the model creates in `generate` and in calls without gradients, so pipelines
and servers need no change. It is not a `cache_implementation`, because transformers has a closed list of those.
"""

SOURCES = "`benchmarks/kv_cache.py` measures; `tools/write_kv_cache.py` writes this page.\n"


def main() -> None:
    """Writes the page."""
    TARGET.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return "\n".join(
        [INTRODUCTION, *accuracy(results["model"], results["accuracy"]), *speed(results["speed"]), SOURCES]
    )


def prose(*pieces: str) -> str:
    """One paragraph, wrapped."""
    return textwrap.fill(" ".join(pieces), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def accuracy(model: str, results: dict[str, Any]) -> list[str]:
    """The accuracy that the INT8 cache costs."""
    measured, (windows, length) = results["results"], results["windows"]
    prompt, chunk, single = (results["pieces"].count(size) for size in (256, 64, 1))
    rows = [f"| {name} | {cells(against['float32'])} |" for name, against in measured.items()]
    pure, base, int8 = (measured[f"{name} cache"]["float32"] for name in ("float32, int8", "W8A8, bf16", "W8A8, int8"))
    apart, control = (measured[f"W8A8, {name}"]["W8A8, bf16 cache"] for name in ("int8 cache", "no cache"))
    weights = measured["8-bit weights only, int8 cache"]["8-bit weights only"]
    return [
        "## Accuracy\n",
        prose(
            f"{model}, on {pure['tokens']:,} predicted tokens of speeches of 2010 and later: {windows}",
            f"windows of {length}. Every token went through the cache, in {prompt} piece of 256, {chunk} of 64 and",
            f"{single} single tokens. The reference is the float32 model; KL is the KL divergence in nats a token,",
            "with its standard error over windows.",
        ),
        "| model | KL | perplexity | change | same top-1 |",
        "|---|---:|---:|---:|---:|",
        *rows,
        "",
        prose(
            f"The INT8 cache by itself costs {pure['kl']:.4f} nats. It raises the W8A8 model's divergence from",
            f"{base['kl']:.4f} to {int8['kl']:.4f} and changes its perplexity by {100 * apart['change']:+.2f} %",
            f"±{100 * apart['change_error']:.2f}. Compared with each other, the W8A8 models with the bf16 and the INT8",
            f"cache diverge by {apart['kl']:.4f} ±{apart['kl_error']:.4f} nats and agree on the likeliest token in",
            f"{100 * apart['top1']:.1f} %. The rounding of activations causes this: a small change moves many of them",
            "across a rounding step, which replaces the error of W8A8 by another one of the same size. With the same",
            f"8-bit weights and products in floating point, the cache alone gives {weights['kl']:.4f}. Between the",
            "bf16 cache and no cache, where only the rounding to bf16 differs, the divergence is",
            f"{control['kl']:.4f}. Other models were not measured. Some models have a few much larger channels in",
            "their keys; they are likely to lose more.",
        ),
        about(results),
    ]


def cells(evaluation: dict[str, Any]) -> str:
    """One row's numbers."""
    e = evaluation
    change = f"{100 * e['change']:+.2f} % ±{100 * e['change_error']:.2f}"
    return f"{e['kl']:.5f} ±{e['kl_error']:.5f} | {e['perplexity']:.3f} | {change} | {100 * e['top1']:.1f} %"


def speed(results: dict[str, Any]) -> list[str]:
    """The bytes and the time that it saves."""
    bf16, int8 = (results["bytes_per_token"][kind] for kind in ("bf16", "int8"))
    shape = results["attention_shape"]
    return [
        "## Memory and speed\n",
        prose(
            f"A token takes {int8:,.0f} bytes instead of {bf16:,.0f}, a factor of {int8 / bf16:.2f}. Milliseconds",
            "of one decoding step:",
        ),
        *table(results["decode_seconds"]),
        "",
        prose(
            f"Attention alone: milliseconds of one layer in the shape of an 8B model ({shape['heads']} query heads,",
            f"{shape['kv_heads']} key-value heads, {shape['head_dim']} elements each), with keys and values in main",
            "memory (cold caches):",
        ),
        *table(results["attention_seconds"]),
        "",
        prose(
            f"Both caches took turns in every round. The numbers are medians over {results['rounds']} rounds; a round",
            f"of the first table is {results['steps']} tokens. Other work shared the machine, so compare ratios rather",
            "than times. In this small model, weights and arithmetic take most of a step. The kernels do not use the",
            "integer products of VNNI, because those would require q to be rounded too.",
        ),
        about(results),
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Medians of both kinds and their ratio."""
    lines = ["| batch | context | bf16 | int8 | faster |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        bf16, int8 = row["median"]["bf16"], row["median"]["int8"]
        times = f"{1e3 * bf16:.2f} | {1e3 * int8:.2f} | {bf16 / int8:.2f} times"
        lines.append(f"| {row['batch']} | {row['context']} | {times} |")
    return lines


def about(results: dict[str, Any]) -> str:
    """The machine, the commit and the versions of a measurement."""
    machine = dict(results["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("versions").items())
    return prose(f"Measured with: {', '.join(f'{name} {value}' for name, value in machine.items())}; {versions}.")


if __name__ == "__main__":
    main()
