"""Tables say what was measured, in terminals of any width; outliers are what the activations show."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from tiny import amplify_outliers, build, token_ids

from smoothquant_ext import Recipe, SmoothQuantError, quantize
from smoothquant_ext.evaluation.accuracy import Evaluation
from smoothquant_ext.evaluation.size import ModelBytes
from smoothquant_ext.evaluation.speed import Speed
from smoothquant_ext.quantization.report import LayerReport, Report
from smoothquant_ext.reporting.outliers import LayerInput, measure_outliers, outlier_table, plot_outliers
from smoothquant_ext.reporting.tables import (
    Measured,
    comparison_markdown,
    comparison_table,
    legend,
    measured_dict,
    render_report,
)

FLOAT = Measured(
    "fp32",
    Evaluation(1022, 25.2184, 0.31, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    ModelBytes(400_000_000, 538_000_000),
    Speed(512, 32, 1, (0.5, 0.512, 0.9), (1.0, 1.6, 2.0)),
)
QUANTIZED = Measured(
    "SmoothQuant dynamic",
    Evaluation(1022, 25.3871, 0.32, 0.00669, 0.0012, 0.0089, 0.0004, 0.943, 0.003),
    ModelBytes(101_000_000, 163_500_000),
)


def rendered(item: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(item)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if name in line).replace(name, "").split()


def test_a_comparison_fits_an_ordinary_terminal_without_cutting_a_number():
    text = rendered(comparison_table([FLOAT, QUANTIZED], "On speeches"))
    assert "On speeches" in text
    assert row(text, "fp32") == ["25.218", "+0.00", "0.0000", "100.0", "538.0", "1.000x", "1000", "20.0"]
    assert row(text, QUANTIZED.name) == ["25.387", "+0.67", "0.0089", "94.3", "163.5", "0.253x", "–", "–"]


def test_standard_errors_are_shown_where_there_is_room_and_only_where_they_mean_something():
    text = rendered(comparison_table([FLOAT, QUANTIZED], errors=True), width=120)
    assert row(text, QUANTIZED.name)[:7] == ["25.387", "+0.67", "±0.12", "0.0089", "±0.0004", "94.3", "±0.3"]
    assert "±" not in next(line for line in text.splitlines() if "fp32" in line)


def test_without_a_reference_what_was_not_measured_is_a_dash():
    alone = Measured("m", Evaluation(10, 3.0), ModelBytes(4, 8))
    assert row(rendered(comparison_table([alone])), "m ")[:4] == ["3.000", "–", "–", "–"]


def test_markdown_has_the_same_cells():
    lines = comparison_markdown([FLOAT, QUANTIZED]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [len(line) for line in cells] == [9] * 4
    assert cells[3][:4] == [QUANTIZED.name, "25.387", "+0.67 ±0.12", "0.0089 ±0.0004"]


def test_json_has_the_plain_numbers():
    data = json.loads(json.dumps([measured_dict(FLOAT), measured_dict(QUANTIZED)]))
    assert data[0]["prefill_tokens_per_second"] == 1000.0
    assert data[0]["speed"]["decode_seconds"] == [1.0, 1.6, 2.0]
    assert data[1]["kl"] == 0.0089
    assert data[1]["speed"] is None
    assert data[1]["decoder_bytes"] == 101_000_000


def test_the_legend_explains_every_abbreviation():
    text = rendered(legend())
    assert all(word in text for word in ("change", "KL", "top-1", "±", "decoder"))


def test_the_report_of_a_run_puts_alike_blocks_on_one_line():
    model = build("llama")
    amplify_outliers(model)
    quantize(model, token_ids(), Recipe(skip=("layers.1.*.down_proj",)), progress=False)
    text = rendered(render_report(model.smoothquant_report), width=100)
    assert "13 linear layers run in int8" in text
    assert "Left in floating point, because output embedding: lm_head" in text
    assert "because skipped by pattern: model.layers.*.mlp.down_proj (1)" in text
    smoothed = next(line for line in text.splitlines() if "input_layernorm" in line)
    groups, alpha, before, after = smoothed.split()[-4:]
    assert "q_proj, k_proj, v_proj" in smoothed
    assert (groups, alpha) == ("2", "0.5")
    assert float(before) > 10 > 3 > float(after)


def test_the_report_of_an_unsmoothed_run_does_not_complain_of_it():
    model = quantize(build("llama"), token_ids(), Recipe("fp8", smooth=False), progress=False)
    text = rendered(render_report(model.smoothquant_report))
    assert "14 linear layers run in fp8" in text
    assert "smooth" not in text.lower()


def test_the_report_gives_the_reason_of_each_failure_once():
    report = Report(
        Recipe(),
        quantized=["h.0.fc", "h.1.fc", "h.2.fc"],
        failed={
            "h.0.norm": "folding it changes the block's output by 3.1e-02 (relative), so it was undone",
            "h.1.norm": "folding it changes the block's output by 2.7e-02 (relative), so it was undone",
            "h.1.gate": "its output is also read by something other than fc",
        },
        layers={
            f"h.{block}.fc": LayerReport(torch.ones(2), torch.ones(2), alpha=0.5 if block == 2 else None)
            for block in range(3)
        },
        fused=["h.0.norm", "h.1.norm", "norm"],
    )
    text = " ".join(rendered(render_report(report)).split())
    assert "by 3.1e-02 (relative), so it was undone: h.*.norm (2)" in text
    assert "2.7e-02" not in text
    assert "other than fc: h.*.gate (1)" in text
    assert "In 8 bits without smoothing: h.*.fc (2)" in text
    assert "Fused into one pass: h.*.norm (2), norm" in text


def test_outliers_are_the_largest_channel_over_the_median_before_and_after():
    model, ids = build("llama"), token_ids(4, 24)
    amplify_outliers(model, factor=40.0)
    seen: dict[str, torch.Tensor] = {}
    linear = model.model.layers[1].mlp.gate_proj
    handle = linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        before = model(ids).logits
        channels = seen["x"].abs().amax(dim=(0, 1))
        inputs = measure_outliers(model, ids, Recipe(alpha=0.5))
        after = model(ids).logits
    handle.remove()
    gate = next(layer for layer in inputs if layer.block.endswith("layers.1") and "gate_proj" in layer.label)
    assert gate.linears == ("mlp.gate_proj", "mlp.up_proj")
    assert gate.ratio_before == pytest.approx(float(channels.max() / channels.median()), rel=1e-4)
    assert gate.ratio_before > 10 * gate.ratio_after
    # smoothing kept the function: fp32 rounding of a few hundred operations in a row
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))


def test_the_table_of_outliers_has_a_row_per_block_and_a_column_per_input(capsys):
    inputs = measure_outliers(build("llama"), token_ids(), progress=True)
    text = rendered(outlier_table(inputs), width=110)
    assert all(label in text for label in ("q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"))
    assert len(row(text, "model.layers.1")) == 4 * 3  # "before → after" each
    assert capsys.readouterr().out == ""


def test_without_smoothing_nothing_changes():
    inputs = measure_outliers(build("llama"), list(token_ids().split(1)), Recipe(smooth=False))
    assert all(torch.equal(layer.before, layer.after) for layer in inputs)


def layer(block: str, *linears: str, top: float = 8.0) -> LayerInput:
    return LayerInput(block, linears, torch.tensor([1.0, 2, 3, 4, 5, 6, 7, top]), torch.ones(8))


def test_many_kinds_of_inputs_become_rows_and_experts_one_line():
    kinds = [layer("h.0", f"kind{chr(97 + i)}") for i in range(9)]
    experts = [layer("h.0", f"moe.experts.{i}.w1", f"moe.experts.{i}.w3", top=8.0 + i) for i in range(30)]
    text = rendered(outlier_table(kinds + experts))
    assert len([line for line in text.splitlines() if "experts" in line]) == 1
    assert row(text, "moe.experts.*.w1/w3")[-3:] == ["9.2", "→", "1.0"]  # the last: 37 / 4


def test_the_picture_is_drawn(tmp_path):
    inputs = measure_outliers(build("llama"), token_ids())
    plot_outliers(inputs, tmp_path / "outliers.png", "tiny")
    plot_outliers(inputs, tmp_path / "outliers.svg")
    assert (tmp_path / "outliers.png").read_bytes().startswith(b"\x89PNG")
    drawing = (tmp_path / "outliers.svg").read_text()
    assert "<svg" in drawing


@pytest.mark.parametrize("name", ["missing/o.png", "o.notaformat"])
def test_a_picture_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(SmoothQuantError, match=f"{name} cannot be written"):
        plot_outliers([layer("h.0", "fc")], tmp_path / name)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SmoothQuantError, match=r"pip install 'smoothquant-ext\[plots\]'"):
        plot_outliers([layer("h.0", "fc")], tmp_path / "o.png")
