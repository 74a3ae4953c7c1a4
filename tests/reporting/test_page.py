"""The report page: complete, well-formed, without anything from outside."""

from __future__ import annotations

import builtins
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import SMALL, complaint, smoothquant
from command_line import work as work  # the fixture
from tiny import amplify_outliers, build, token_ids

from smoothquant_ext import Recipe, SmoothQuantError, quantize, save
from smoothquant_ext.checkpoint.record import read_record
from smoothquant_ext.evaluation.accuracy import Evaluation
from smoothquant_ext.evaluation.size import ModelBytes
from smoothquant_ext.evaluation.speed import Speed
from smoothquant_ext.reporting.facts import Facts
from smoothquant_ext.reporting.figures import Pictures
from smoothquant_ext.reporting.page import render_page, write_page
from smoothquant_ext.reporting.tables import Measured

VOID = {"meta", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: list[str] = field(default_factory=list)


class Page(HTMLParser):
    """A page taken apart; an element that is not closed where it should be fails the test."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.elements: list[Element] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[element.tag for element in self.open]}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("th", "td", "br"):
            self.handle_data(" ")
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop().tag == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text.append(data)

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def texts(self, tag: str) -> list[str]:
        return [" ".join("".join(element.text).split()) for element in self.all(tag)]

    @property
    def words(self) -> str:
        """All that a reader sees or hears."""
        labels = [element.attributes.get("aria-label") or "" for element in self.elements]
        return " ".join([*self.texts("body"), *labels])


def tiny_record(directory: Path, recipe: Recipe, architecture: str = "llama") -> dict[str, Any]:
    model = build(architecture)
    amplify_outliers(model)
    save(quantize(model, token_ids(8, 24), recipe, progress=False), directory)
    return read_record(directory)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a model whose alphas were searched, and whose worst unit was left out."""
    return tiny_record(tmp_path_factory.mktemp("tuned") / "w8a8", Recipe(alpha="auto", auto_skip=1))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have their descriptions alone: drawing them is what takes a page's time."""

    def describe(_self: Pictures, _draw: object, _height: float, description: str) -> str:
        return f'<svg role="img" aria-label="{escape(description, quote=True)}"></svg>'

    monkeypatch.setattr(Pictures, "_svg", describe)


def with_facts(record: dict[str, Any], name: str, **facts: object) -> dict[str, Any]:
    """The record with other facts about one layer."""
    return {**record, "layers": {**record["layers"], name: {**record["layers"][name], **facts}}}


@pytest.fixture(scope="module")
def html(tuned: dict[str, Any]) -> str:
    """Its page."""
    return render_page(tuned, "my <model>", weight_bytes=1_234_567)


def measured(name: str, perplexity: float, speed: Speed | None = None, **against: float) -> Measured:
    return Measured(name, Evaluation(920, perplexity, 0.1, **against), ModelBytes(1000, 2_500_000), speed)


def test_the_page_is_well_formed_and_needs_nothing_from_outside(html):
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.all("html")[0].attributes["lang"] == "en"
    assert any(element.attributes.get("name") == "viewport" for element in page.all("meta"))
    assert not page.all("script", "link", "iframe")
    for element in page.elements:
        for name, value in element.attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert re.match(r"#|data:image/png;base64,", value or ""), (element.tag, name, value)
    assert not re.search(r"url\((?!#)|@import", html)


def test_ids_are_unique_and_every_link_leads_somewhere(html):
    ids = Counter(element.attributes["id"] for element in Page(html).elements if "id" in element.attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    links = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    assert len(links) > 20
    assert {a or b for a, b in links} <= set(ids)


def test_headings_go_down_by_one_level_and_pictures_are_described(html):
    page = Page(html)
    levels = [int(element.tag[1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    pictures = page.all("svg")
    assert len(pictures) == 4 * 2 + 4 + 4 + 2 + 2  # heat maps, ratios, alphas, errors, sensitivity
    assert all(element.attributes["role"] == "img" for element in pictures)
    assert len({element.attributes["aria-label"] for element in pictures}) == len(pictures)
    assert len(page.all("figcaption")) == len(page.all("figure"))


def test_the_page_says_what_the_record_says(tuned, html):
    page = Page(html)
    assert page.texts("h1") == ["my <model>"]
    numbers = page.texts("dd")
    assert numbers[0] == "int8"
    assert f"{len(tuned['quantized'])} of {len(tuned['quantized']) + len(tuned['skipped'])}" in numbers
    assert "1.2 MB" in numbers
    rows = page.texts("tr")
    assert len(tuned["skipped"]) >= 2  # the output embedding and the worst unit
    for name, reason in tuned["skipped"].items():
        assert any(name in row and reason in row for row in rows), (name, reason)
    assert any(row.startswith("Weights rounded GPTQ") for row in rows)
    assert "Left out by sensitivity up to 1 layer" in rows
    for step in tuned["seconds"]:
        assert any(row.startswith(step) for row in rows)
    assert page.texts("footer") == [f"Quantized with smoothquant-ext {tuned['package']}."]
    assert not re.search(r"\b(nan|None|inf|null|undefined)\b", page.words)


def test_every_alpha_is_in_the_table_of_its_block(tuned, html):
    rows = [row.split(" ") for row in Page(html).texts("tr") if row.startswith("model.layers.")]
    said = {row[0]: row[1:] for row in rows if re.fullmatch(r"model\.layers\.\d+", row[0])}
    assert list(said) == ["model.layers.0", "model.layers.1"]
    for block, cells in said.items():
        alphas = [f"{group['alpha']:.3g}" for group in tuned["groups"] if group["consumers"][0].startswith(f"{block}.")]
        assert sorted(cell for cell in cells if cell not in ("not", "smoothed")) == sorted(alphas)


@pytest.mark.usefixtures("undrawn")
def test_an_input_that_was_not_smoothed_is_shown_as_such(tuned):
    group, *rest = tuned["groups"]
    record = {**tuned, "groups": rest}
    for name in group["consumers"]:
        record = with_facts(record, name, alpha=None)
    page = Page(render_page(record, "tiny"))
    assert any("not smoothed" in row for row in page.texts("tr"))
    assert any(name in text for text in page.texts("p") for name in group["consumers"])
    assert "1 block not smoothed" in page.words


def test_facts_are_sorted_by_block_and_kind(tuned):
    facts = Facts(tuned)
    assert list(facts.kinds) == ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]
    layers = tuned["layers"]
    for label, layer in (("q_proj, k_proj, v_proj", "self_attn.k_proj"), ("down_proj", "mlp.down_proj")):
        of_blocks = [layers[f"model.layers.{block}.{layer}"] for block in (0, 1)]
        assert facts.kinds[label].before.tolist() == [facts_of["before"] for facts_of in of_blocks]
        assert facts.kinds[label].ratio_after.tolist() == [facts_of["ratio_after"] for facts_of in of_blocks]
    errors = [layers[f"model.layers.{block}.mlp.up_proj"]["error"] for block in (0, 1)]
    assert facts.errors["mlp.up_proj"].tolist() == errors
    assert facts.block_errors.tolist() == [block["error"] for block in tuned["blocks"].values()]
    assert [kl for _, kl, _ in facts.sensitivity] == sorted((unit["kl"] for unit in tuned["sensitivity"]), reverse=True)
    assert [is_out for _, _, is_out in facts.sensitivity].count(True) == 1
    assert {name for name, _ in facts.left_out} == {
        name.split(".", 3)[3] for name in tuned["skipped"] if name.startswith("model.layers.")
    }


@pytest.mark.usefixtures("undrawn")
def test_measured_quality_and_speed_are_shown_beside_the_original(tuned, html):
    speed = Speed(512, 32, 1, (0.5, 0.5), (1.0, 1.0))
    models = [
        measured("hub/base", 20.0, speed, change=0.0, kl=0.0, top1=1.0),
        measured("out/w8a8", 20.5, speed, change=0.025, kl=0.0123, top1=0.95, kl_error=0.001),
    ]
    page = Page(render_page(tuned, "tiny", models))
    row = next(row for row in page.texts("tr") if row.startswith("w8a8"))
    assert row == "w8a8 20.500 +2.50 0.0123 ±0.0010 95.0 2.5 1.000x 1024 32.0"
    assert "+2.50 %" in page.texts("dd")
    assert "median of 2 rounds" in page.words
    slow = Page(render_page(tuned, "tiny", [measured("a", 20.0), measured("b", 21.0, change=0.05, kl=0.1, top1=0.9)]))
    assert "tok/s" not in slow.words
    assert "--base" in Page(html).words


@pytest.mark.parametrize(
    ("architecture", "recipe", "expected"),
    [
        ("llama", Recipe(smooth=False), "Smoothing was not asked for."),
        (
            "llama",
            Recipe("int8-static", alpha="auto"),
            "Static scales for each input the one with the least error of the block’s output",
        ),
        ("gpt2", Recipe(), "Could not be smoothed"),
        ("mixtral", Recipe(only=("*.self_attn.*",)), "Only *.self_attn.*"),
    ],
)
def test_pages_of_other_models_and_recipes(tmp_path, architecture, recipe, expected):
    record = tiny_record(tmp_path / "w8a8", recipe, architecture)
    page = Page(render_page(record, "tiny"))
    assert expected in page.words
    assert not re.search(r"\b(nan|None|inf)\b", page.words)
    assert "#sensitivity" not in {element.attributes.get("href") for element in page.all("a")}


def test_of_several_experts_the_worst_counts(tuned):
    layer = tuned["layers"]["model.layers.1.mlp.up_proj"]
    experts = {
        f"model.layers.1.mlp.experts.{expert}.up_proj": layer | {"error": error}
        for expert, error in ((2, 0.1), (7, 0.3), (9, 0.2))
    }
    errors = Facts({**tuned, "layers": experts}).errors["mlp.experts.*.up_proj"]
    assert np.isnan(errors[0])
    assert errors[1] == 0.3


def test_numbers_that_are_none_leave_gaps(tuned):
    broken = with_facts(tuned, "model.layers.1.mlp.down_proj", error=float("nan"), ratio_before=float("inf"))
    broken["blocks"] = {**tuned["blocks"], "model.layers.0": {"error": float("nan"), "inputs": []}}
    facts = Facts(broken)
    assert np.isnan(
        [facts.errors["mlp.down_proj"][1], facts.kinds["down_proj"].ratio_before[1], facts.block_errors[0]]
    ).all()
    assert not re.search(r"\b(nan|None|inf)\b", Page(render_page(broken, "tiny")).words)


@pytest.mark.usefixtures("undrawn")
def test_massive_activations_scales_per_token_and_limits_are_listed(tuned, html):
    assert "No token towers over the others" in Page(html).words
    assert "static" not in Page(html).words
    name = "model.layers.1.mlp.down_proj"
    page = Page(render_page(with_facts(tuned, name, massive=[1850.9, 7], per_token=True), "tiny"))
    assert f"{name} 1,851 7" in page.texts("tr")
    assert any(name in text and "too few steps" in text for text in page.texts("p"))
    clipped = with_facts(with_facts(tuned, name, limit=0.75), "model.layers.0.mlp.down_proj", limit=1.25)
    words = Page(render_page(clipped, "tiny")).words
    assert "Static scales are clipped in 1 of 2 layers: they represent magnitudes up to 75% to 75%" in words
    unclipped = with_facts(tuned, name, limit=1.1)
    assert "keep the largest calibrated magnitude" in Page(render_page(unclipped, "tiny")).words


@pytest.mark.usefixtures("undrawn")
def test_a_file_appears_whole_or_not_at_all(tuned, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(SmoothQuantError, match="No space left"):
            write_page(tuned, target, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_text() == "old"
    write_page(tuned, target, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert Page(target.read_text(encoding="utf-8")).texts("h1") == ["tiny"]


def test_without_matplotlib_one_sentence_says_how_to_get_it(tuned, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SmoothQuantError, match=r"smoothquant-ext\[plots\]"):
        write_page(tuned, tmp_path / "report.html", "tiny")


def test_the_command_writes_a_page_into_the_current_directory(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = smoothquant("report", work / "w8a8")
    assert result.stdout == "Report: w8a8-report.html\n"
    page = Page((tmp_path / "w8a8-report.html").read_text(encoding="utf-8"))
    assert page.texts("h1") == ["w8a8"]
    megabytes = (work / "w8a8" / "model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:.1f} MB" in page.texts("dd")
    assert "Not measured for this page" in page.words


@pytest.mark.usefixtures("undrawn")
def test_the_command_measures_where_a_base_is_given(work, tmp_path):
    arguments = ("--base", work / "model", "--text", work / "text.txt", *SMALL, "--rounds", 0)
    smoothquant("report", work / "w8a8", "-o", tmp_path / "page.html", *arguments)
    (base, quantized) = Page((tmp_path / "page.html").read_text(encoding="utf-8")).texts("tr")[1:3]
    assert base.startswith("model ")
    assert quantized.startswith("w8a8 ")
    compared = smoothquant("compare", work / "model", work / "w8a8", *arguments[2:], "--json").stdout
    assert f"{json.loads(compared)[1]['perplexity']:.3f}" in quantized


def test_a_checkpoint_without_a_record_or_a_place_without_a_folder_is_one_sentence(work, tmp_path, monkeypatch):
    monkeypatch.setattr("smoothquant_ext.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert "has no smoothquant.json" in complaint("report", tmp_path, "--base", work / "model")
    nowhere = tmp_path / "no" / "page.html"
    assert "does not exist, make it first" in complaint("report", work / "w8a8", "-o", nowhere, "--base", "any")
    assert list(tmp_path.iterdir()) == []


def test_the_help_has_an_example():
    assert "Example: smoothquant report" in smoothquant("report", "--help").stdout


def test_the_template_is_packaged():
    patterns = re.search(r"smoothquant_ext = (\[.*\])", (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert patterns is not None
    assert "**/*.j2" in json.loads(patterns[1])
