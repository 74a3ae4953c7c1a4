"""Names of tensors in a sentence, and the patterns that let them be dropped."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smoothquant_ext.checkpoint.completeness import SHOWN, counted, drop_patterns, name_families

PARTS = st.sampled_from(["model", "layers", "0", "1", "10", "mtp", "weight", "bias", "a_b", "x[0]", "q*"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(st.sets(NAMES, min_size=1, max_size=12), st.sets(NAMES, max_size=12))
def test_patterns_match_what_is_to_go_and_nothing_else(names: set[str], needed: set[str]) -> None:
    needed -= names
    patterns = drop_patterns(names, needed)
    assert len(patterns) <= len(names)
    assert all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names)
    assert not any(fnmatchcase(name, pattern) for name in needed for pattern in patterns)


@given(st.sets(NAMES, min_size=1, max_size=30))
def test_every_name_is_counted_once(names: set[str]) -> None:
    text = name_families(names)
    assert "\n" not in text
    shown = text.partition(" and ")[0].split(", ")
    assert len(shown) <= SHOWN
    if " and " not in text:
        counts = [int(part.rpartition("(")[2][:-1]) if part.endswith(")") else 1 for part in shown]
        assert sum(counts) == len(names)


def test_patterns_of_real_names() -> None:
    needed = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(12)] + ["lm_head.weight"]
    assert drop_patterns(["model.layers.61.a.weight", "model.layers.61.b.0.c"], needed) == ["model.layers.61.*"]
    assert drop_patterns(["vision_tower.0.w", "mtp.w"], needed) == ["mtp.*", "vision_tower.*"]
    biases = [f"model.layers.{layer}.mlp.up_proj.bias" for layer in range(12)]
    assert drop_patterns(biases, needed) == ["model.layers.*.mlp.up_proj.bias"]
    assert drop_patterns(["lm_head.bias"], needed) == ["lm_head.bias"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["b", "a"], "a, b"),
        ([f"layers.{layer}.w" for layer in range(2, 11)], "layers.2-10.w (9)"),
        (["layers.2.w", "layers.7.w"], "layers.*.w (2)"),
        ([f"layers.3.experts.{expert}.w" for expert in range(4)], "layers.3.experts.0-3.w (4)"),
        ([f"l.{layer}.e.{expert}.w" for layer in (1, 3) for expert in range(2)], "l.*.e.0-1.w (4)"),
        (["layers.10.w", "layers.9.v", "layers.9.w"], "layers.9.v, layers.9-10.w (2)"),
        (["a", "b", "c", "d", "e", "f"], "a, b, c, d and 2 more kinds"),
    ],
)
def test_families(names: list[str], text: str) -> None:
    assert name_families(names) == text


def test_counting() -> None:
    assert [counted(number, "tensor") for number in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
