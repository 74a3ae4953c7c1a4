"""Writes docs/accuracy.md from what accuracy.py measured: benchmarks/results/accuracy-*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("accuracy-*.json"))

INTRODUCTION = """# Accuracy

How far W8A8 models drift from their float32 original: KL divergence of the predictions in nats a token (lower is
better), with its standard error over windows; rank by this, since perplexity can fall below the original's by chance.
All models are made from the same original with the same calibration windows (16 x 512 tokens of speeches of the 1990s),
run on the same 8-bit kernels with everything else in float32, and are tested on the same windows of 512 tokens. Every
linear layer of the decoder is in 8 bits, except where a row says that some were skipped. Made by
`benchmarks/accuracy.py` (`make accuracy`), written by `benchmarks/write_accuracy.py`.
"""

NOTES = """
## What the rows are

- *alpha auto*: `--alpha auto`. One alpha, or none, for each smoothing group, by the error of its decoder block's output
  on held-out windows, with weights and activations quantized as they will run. Weights are then rounded by GPTQ, unless
  the row says nearest.
- *skip 5 %*: `--auto-skip 5%`. Each set of layers that share an input was quantized alone, its KL divergence measured,
  and the worst were left in floating point, at most 5 % of all layers.
- *int8-static, alpha auto*: inputs whose largest token is more than four times the median one get a scale per token,
  since a static one would leave the median token less than 32 of the 127 steps: here 34 of 120 inputs, nearly all
  `down_proj`. The other scales are static, the largest magnitude seen unless another limit does at least 10 % better on
  held-out windows. Clipping harder than that fitted the calibration text and lost on the test texts. Static ranges do
  not carry over to text unlike the calibration text, as WikiText-2 is here: calibrate on text like yours.
- *llm-compressor*: its SmoothQuant (0.5) with rounding to nearest, and the widely published recipe of SmoothQuant (0.8)
  with GPTQ. *LMDeploy's rule*: its formula for s, in our pipeline.
"""


def main() -> None:
    """Writes the page."""
    parts = [INTRODUCTION]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS]
    for each in sorted(found, key=lambda one: float(one["amplify"])):
        parts += section(each)
    (ROOT / "docs" / "accuracy.md").write_text("\n".join(parts) + NOTES, encoding="utf-8")


def section(found: dict[str, Any]) -> list[str]:
    """One run as a heading, a table and what it was measured with."""
    factor = found["amplify"]
    title = "SmolLM2-135M-Instruct" + (f", with outliers {factor:g} times larger" if factor != 1 else "")
    texts = found["results"]
    lines = [f"## {title}", ""]
    lines.append(" | ".join(["| model", *(f"{t}: KL | perplexity | top-1" for t in texts), "made in |"]))
    lines.append("|---|" + "---:|" * (3 * len(texts) + 1))
    for name, took in found["seconds"].items():
        cells = []
        for evaluations in texts.values():
            e = evaluations[name]
            cells += [f"{e['kl']:.4f} ±{e['kl_error']:.4f}", f"{e['perplexity']:.3f}", f"{100 * e['top1']:.1f} %"]
        lines.append(f"| {' | '.join([name, *cells, f'{took:.0f} s' if took > 1 else '–'])} |")
    tokens = {text: next(iter(evaluations.values()))["tokens"] for text, evaluations in texts.items()}
    about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    counted = " and ".join(f"{count:,} of {text}" for text, count in tokens.items())
    return [
        *lines,
        "",
        f"{counted} tokens predicted. {about}, commit {found['commit'][:7]}. {found.get('note', '')}".rstrip(),
        "",
    ]


if __name__ == "__main__":
    main()
