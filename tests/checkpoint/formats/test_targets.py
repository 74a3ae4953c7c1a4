"""Which targets a layer belongs to: compressed-tensors' own function is the oracle, our names of names come on top."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

from smoothquant_ext.checkpoint.formats.base import QuantizationMap
from smoothquant_ext.checkpoint.formats.compressed_tensors import CompressedTensors
from smoothquant_ext.checkpoint.formats.targets import LINEAR, Targets, spellings
from smoothquant_ext.scheme import SCHEMES

INT8, FP8, STATIC = SCHEMES["int8"], SCHEMES["fp8"], SCHEMES["int8-static"]
DOWN, UP, HEAD = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "lm_head"
TARGETS = [
    "Linear",
    "Module",
    "LlamaMLP",
    "Embedding",
    DOWN,
    HEAD,
    "model.layers.0.mlp",  # a parent
    r"re:.*down_proj",
    r"re:.*down_proj$",
    r"re:.*layers\.0\..*",
    r"re:^model\.",
    r"re:down_proj",  # matches from the start, so it matches nothing
    r"re:model.layers.0",
    r"re:.*lm_head",
    r"re:(?!.*down).*proj",
    "re:",
]
NAMES = [DOWN, UP, HEAD, "model.layers.10.self_attn.q_proj", "visual.blocks.0.attn.qkv", "a"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_order_of_targets_is_that_of_compressed_tensors(size: int) -> None:
    match_targets = pytest.importorskip("compressed_tensors.utils.match").match_targets
    linear = nn.Linear(1, 1)
    matched = 0
    for targets in itertools.permutations(TARGETS, size) if size < 3 else itertools.combinations(TARGETS, size):
        compiled = Targets(targets)
        for name in NAMES:
            expected = match_targets(name, linear, targets)
            ours = (compiled.of_name([name]) or compiled.of_class(LINEAR))[:1]
            assert ours == expected[:1], (name, targets)
            matched += bool(expected)
    assert matched > 20


def scheme_of(name: str, *groups: tuple[str, object]) -> object:
    groups_of_map = tuple(((target,), scheme) for target, scheme in groups)
    return QuantizationMap(CompressedTensors(), groups_of_map, complete=True).scheme_of(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [DOWN, r"re:.*down_proj", r"re:.*\.mlp\.down_proj$"])
@pytest.mark.parametrize("other", [FP8, STATIC])
def test_a_name_or_pattern_goes_before_a_class_wherever_it_stands(target: str, other: object) -> None:
    groups = [("Linear", INT8), (target, other)]
    for order in (groups, groups[::-1]):
        assert scheme_of(DOWN, *order) is other
        assert scheme_of(UP, *order) is INT8


def test_a_name_goes_before_a_pattern_and_a_repeated_target_belongs_to_the_last_group() -> None:
    groups = [(r"re:.*down_proj", INT8), (DOWN, FP8), ("Linear", STATIC)]
    for order in itertools.permutations(groups):
        assert scheme_of(DOWN, *order) is FP8
    assert scheme_of(UP, ("Linear", INT8), ("Linear", FP8)) is FP8


def test_a_head_is_a_linear_layer_unless_it_is_named() -> None:
    assert scheme_of(HEAD, ("Linear", INT8)) is INT8
    assert scheme_of(HEAD, ("Linear", INT8), (HEAD, FP8)) is FP8
    assert ct_map().expects(HEAD)
    assert not ct_map((), ((r"re:model\..*",), INT8)).expects(HEAD)


@pytest.mark.parametrize(
    ("names", "other"),
    [
        (["visual.blocks.0.attn.qkv"], "model.visual.blocks.0.attn.qkv"),
        (["model.visual.blocks.0.attn.qkv"], "visual.blocks.0.attn.qkv"),
        (["model.layers.0.mlp.up_proj"], "model.language_model.layers.0.mlp.up_proj"),
        (["model.language_model.layers.0.mlp.up_proj"], "language_model.model.layers.0.mlp.up_proj"),
        (["language_model.model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
        (["model.text_model.layers.0.mlp.up_proj"], "model.layers.0.mlp.up_proj"),
        (["language_model.lm_head"], "lm_head"),
        (["lm_head"], "language_model.lm_head"),
    ],
)
def test_spellings(names: list[str], other: str) -> None:
    assert other in spellings(names)
    assert not set(spellings(names)) & set(names)


def test_spellings_keep_what_tells_two_parts_of_a_model_apart() -> None:
    parts = ["thinker.model.layers.0.q", "talker.model.layers.0.q", "visual.layers.0.q", "model.layers.0.q", "model"]
    for one, other in itertools.permutations(parts, 2):
        assert other not in spellings([one]), (one, other)


FILE, MODEL, UNITED = "visual.mlp.0", "model.visual.mlp.0", "model.layers.0.mlp.up_proj"


def ct_map(ignore: tuple[str, ...] = (), *groups: tuple[tuple[str, ...], object]) -> QuantizationMap:
    return QuantizationMap(CompressedTensors(), groups or ((("Linear",), INT8),), ignore, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignore", [FILE, MODEL, r"re:^visual\.", r"re:^model\.visual", r"re:.*visual.*"])
def test_either_name_is_ignored(ignore: str) -> None:
    quantization = ct_map((ignore,))
    assert quantization.ignores(FILE, MODEL)
    assert quantization.scheme_of(FILE, MODEL) is None
    assert not quantization.expects(FILE, MODEL)
    assert not quantization.ignores(UNITED)


@pytest.mark.parametrize("target", [FILE, MODEL, r"re:^visual\.", r"re:^model\.visual"])
def test_either_name_is_targeted(target: str) -> None:
    quantization = ct_map((), (("Linear",), INT8), ((target,), FP8))
    assert quantization.scheme_of(FILE, MODEL) is FP8
    assert quantization.scheme_of(UNITED) is INT8


@pytest.mark.parametrize("ignore", ["visual", "model.visual", "model.visual.mlp", "model.visual.mlp.0"])
def test_what_may_be_ignored_need_not_be(ignore: str) -> None:
    """By compressed-tensors' rule the names of parents, and other spellings, ignore nothing: the files decide."""
    quantization = ct_map((ignore,))
    assert quantization.scheme_of(FILE) is INT8  # if its weight has 8 bits
    assert not quantization.expects(FILE)  # if it is a float
    assert quantization.expects("visuals.mlp.0")


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.gate_up_proj"),
    ],
)
def test_layers_that_vllm_joins(layer: str, target: str) -> None:
    assert ct_map((), (("Linear",), INT8), ((target,), FP8)).scheme_of(layer) is FP8
    assert not ct_map((target,)).expects(layer)
    # A pattern is not meant for the joined name: this one would match gate_up_proj.
    assert ct_map((), (("Linear",), INT8), ((r"re:.*(v|up)_proj",), FP8)).scheme_of("mlp.gate_proj") is INT8


def test_ignored_layers_that_do_not_exist_change_nothing() -> None:
    quantization = ct_map(("model.layers.99.mlp.up_proj", r"re:.*mtp.*", "lm_head"))
    assert quantization.scheme_of(UNITED) is INT8
    assert quantization.expects(UNITED)


@pytest.mark.parametrize("weightless", ["LlamaAttention", r"re:.*self_attn$", "Embedding"])
def test_groups_without_weights_of_other_modules_change_nothing(weightless: str) -> None:
    quantization = ct_map((), (("Linear",), INT8), ((weightless,), None))
    assert quantization.scheme_of(UNITED) is INT8
    assert quantization.expects(UNITED)


def test_groups_without_weights_may_mean_float_weights() -> None:
    """A group for the outputs of k_proj stood beside the one for its weights once, and stands in its place now."""
    quantization = ct_map((), (("Linear",), INT8), ((r"re:.*k_proj",), None))
    assert quantization.scheme_of("model.layers.0.self_attn.k_proj") is INT8
    assert not quantization.expects("model.layers.0.self_attn.k_proj")
    assert quantization.expects(UNITED)
