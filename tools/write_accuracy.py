"""Writes docs/accuracy.md from the results of benchmarks/accuracy.py, benchmarks/results/accuracy-*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "accuracy.md"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("accuracy-*.json"))

INTRODUCTION = """# Accuracy

The tables compare W8A8 models with their float32 original. KL is the KL divergence of the predictions in nats a token,
with its standard error over windows; lower is better. Rank models by KL: perplexity can fall below the original's by
chance.

All rows of a table have the same original and the same calibration windows (16 x 512 tokens of speeches of the 1990s).
They run on the same 8-bit kernels, with everything else in float32, and on the same test windows of 512 tokens. Every
linear layer of the decoder is in 8 bits, except where a row says that some were skipped. Peers that run in their own
libraries are named [below](#what-the-rows-are).

`make accuracy` runs `benchmarks/accuracy.py`, which measures; `tools/write_accuracy.py` writes this page.
"""

NOTES = """
## What the rows are

- *alpha auto*: `--alpha auto`. The search chooses one alpha, or no smoothing, for each smoothing group. It minimizes
  the error of the decoder block's output on held-out windows, with weights and activations quantized as they will run.
  GPTQ then rounds the weights, unless the row says nearest.
- *rotated*: `--rotate residual,heads`, folded into the weights. The head shares its weight with the token embedding in
  this model and is stored apart then.
- *rotated at run time too*: `--rotate residual,heads,down`. The input of `down_proj` is rotated while it is quantized,
  in blocks of 256 channels.
- *every input rotated*: `--rotate inputs`. What every layer reads is rotated while it is quantized, in blocks of up to
  256 channels, and with scales per token smoothed before. The head shares its weight with the token embedding, as in
  the original.
- *the default*: what `smoothquant quantize` does, `--rotate inputs,auto`, `--head auto` and GPTQ. Where `auto` rotates,
  it is *every input rotated, gptq*, and where `auto` takes the head, the head and the token embedding have 8 bits too,
  in one weight. In the other rows both stay in floating point.
- *the default for other engines*: what `smoothquant quantize --format compressed-tensors` does,
  `--rotate residual,heads,auto` and GPTQ. `auto` makes no checkpoint larger, so with a head that shares its weight it
  tries the values of attention alone.
- *skip 5 %*: `--auto-skip 5%`. Each set of layers that share an input was quantized alone to measure its KL divergence.
  The worst layers, at most 5 % of all, stayed in floating point.
- *int8-static, alpha auto*: an input gets a scale per token if its largest token is more than four times its median
  token, since a static scale would leave the median token less than 32 of the 127 steps. Here that concerns 34 of 120
  inputs, nearly all `down_proj`. The other scales are static. Each is the largest calibrated magnitude, unless another
  limit lowers the error on held-out windows by at least 10 %: harder clipping fitted the calibration text and lost on
  the test texts. Static scales lose on text unlike the calibration text, as WikiText-2 is here: calibrate on text like
  yours.
- *llm-compressor*: its SmoothQuant (0.5) with rounding to nearest, and the widely published recipe of SmoothQuant (0.8)
  with GPTQ. *spinquant-r1-r2*: its SpinQuant with rotations that are folded into the weights, then GPTQ. *r4*: with a
  rotation of the input of `down_proj` at run time too. *quip*: its QuIP, with a rotation of the input of every layer at
  run time, then GPTQ. All these are random Hadamard matrices over the full width. compressed-tensors computed what
  rotates at run time, with fake quantization. SpinQuant there also subtracts from each token's embedding its mean,
  which RMS norms do not undo: that alone, without quantization, has a KL of 0.0004 (1,022 tokens).
- *llama.cpp, Q8_0*: blocks of 32 weights with a scale in float16, quantized by llama.cpp from the same GGUF file as the
  original, and run by its own kernels, which quantize activations in blocks of 32 too. The token embedding, which is
  also the head, has 8 bits there, as in *the default*. It needs no calibration. *llama.cpp, f32* is the same file
  without quantization: its KL is how far two implementations of float32 are apart.
- *MB*: bytes of the checkpoint, with what is not in 8 bits in bfloat16.
- *LMDeploy's rule*: its formula for s, in this package's pipeline.
"""


def main() -> None:
    """Writes the page."""
    TARGET.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS]
    for run in sorted(runs, key=lambda run: (float(run["amplify"]), "title" in run)):
        parts += section(run)
    return "\n".join(parts) + NOTES


def section(run: dict[str, Any]) -> list[str]:
    """One run: a heading, a table, the machine and the versions."""
    factor = run["amplify"]
    model = run.get("model", "SmolLM2-135M-Instruct")
    title = run.get("title", model + (f", with outliers {factor:g} times larger" if factor != 1 else ""))
    texts = run["results"]
    lines = [f"## {title}", ""]
    size = ["MB"] if "bytes" in run else []
    lines.append(" | ".join(["| model", *(f"{t}: KL | perplexity | top-1" for t in texts), *size, "made in |"]))
    lines.append("|---|" + "---:|" * (3 * len(texts) + len(size) + 1))
    for name, took in run["seconds"].items():
        cells = []
        for evaluations in texts.values():
            e = evaluations.get(name)
            if e is None:
                cells += ["–"] * 3
                continue
            cells += [f"{e['kl']:.4f} ±{e['kl_error']:.4f}", f"{e['perplexity']:.3f}", f"{100 * e['top1']:.1f} %"]
        if size:
            cells.append(f"{run['bytes'][name] / 1e6:.0f}" if name in run["bytes"] else "–")
        lines.append(f"| {' | '.join([name, *cells, f'{took:.0f} s' if took > 1 else '–'])} |")
    tokens = {text: next(iter(evaluations.values()))["tokens"] for text, evaluations in texts.items()}
    about = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
    counted = " and ".join(f"{count:,} of {text}" for text, count in tokens.items())
    return [
        *lines,
        "",
        f"{counted} tokens predicted. {about}, commit {run['commit'][:7]}. {run.get('note', '')}".rstrip(),
        "",
    ]


if __name__ == "__main__":
    main()
