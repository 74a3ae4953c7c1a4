"""Rotations at run time in checkpoints of other tools: executed as a whole, or refused with a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from stored_files import change_config, change_tensors, tensors_of
from tiny_rotated import blocks_of, rotated, rotated_mixture
from tiny_w8a8 import assert_same_model, logits, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothquant_ext import disable, enable, load, save
from smoothquant_ext.checkpoint.converting import convert
from smoothquant_ext.checkpoint.formats.registry import parse_quantization_config
from smoothquant_ext.checkpoint.formats.transforms import is_sylvester, parse_transforms, transform_config
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.hadamard import hadamard
from smoothquant_ext.models import load_model

DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"
DOWNS = r"re:.*down_proj$"
MATRIX = f"{DOWN}.R4_input.weight"


def config(*apply: Mapping[str, Any], **group: Any) -> dict[str, Any]:
    """A ``transform_config`` as SpinQuant of llm-compressor writes it."""
    entries = apply or (
        {"targets": [DOWNS], "location": "input", "inverse": False, "ignore": []},
        {"targets": [DOWNS], "location": "weight_input", "inverse": True, "ignore": []},
    )
    common = {"type": "hadamard", "apply": list(entries), "randomize": False, "requires_grad": False, "head_dim": 16}
    return {"config_groups": {"R4": common | {"precision": "torch.float64"} | group}}


def at(location: str, targets: object = DOWNS, **more: Any) -> dict[str, Any]:
    return {"targets": targets, "location": location, **more}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint whose ``down_proj`` are rotated."""
    save(rotated(), tmp_path / "model")
    return tmp_path / "model"


def set_transforms(directory: Path, value: object) -> None:
    change_config(directory, lambda c: c["quantization_config"].update(transform_config=value))


def assert_refused(directory: Path, message: str, tmp_path: Path) -> None:
    """By every way to load it, and nothing is written."""
    for attempt in (load, lambda path: convert(path, tmp_path / "converted"), through_transformers):
        with pytest.raises(SmoothQuantError, match=message):
            attempt(directory)
    assert not (tmp_path / "converted").exists()


def through_transformers(directory: Path) -> Any:
    enable()
    try:
        return AutoModelForCausalLM.from_pretrained(directory)
    finally:
        disable()


# What is executed.


@pytest.mark.parametrize(
    "value",
    [
        config(),
        config(at("input", [DOWNS])),
        config(at("input", DOWNS)),  # a single target
        config(at("input", inverse=True)),  # its own inverse
        config(at("input", ["Linear"], ignore=["lm_head", r"re:.*(q|k|v|o|up|gate)_proj$"])),
        config(at("input", [DOWN, DOWN.replace("0", "1")])),
        config(at("input", [DOWN]), at("input", ["re:.*1.mlp.down_proj"])),
        config(at("input", [DOWNS, "no.such.layer"])),
        config(at("input", ignore=["lm_head"]), randomize=None, precision=None, requires_grad=None),
        {"config_groups": {**config()["config_groups"], "R1": {"type": "random-matrix", "randomize": True, "apply": [
            at("weight_input", "Linear"), at("weight_output", "re:.*")], "head_dim": 48}}},
    ],
)  # fmt: skip
def test_transforms_of_inputs_are_executed(value: Any, directory: Path, tmp_path: Path) -> None:
    TransformConfig.model_validate({"config_groups": {
        name: {key: v for key, v in group.items() if v is not None} for name, group in value["config_groups"].items()
    }})  # fmt: skip
    set_transforms(directory, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(directory)
        convert(directory, tmp_path / "converted")
    assert_same_model(loaded, rotated())
    assert blocks_of(loaded) == blocks_of(rotated())
    assert_same_model(load(tmp_path / "converted"), loaded)
    assert_same_model(through_transformers(directory), loaded)


@pytest.mark.parametrize(
    "value", [None, {}, {"config_groups": {}}, {"config_groups": None}, config(at("weight_input"))]
)
def test_transforms_of_weights_need_nothing(value: Any, tmp_path: Path) -> None:
    save(quantized(), tmp_path / "model")
    set_transforms(tmp_path / "model", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_model(load(tmp_path / "model"), quantized())


def test_a_block_of_the_whole_width(tmp_path: Path) -> None:
    model = rotated(blocks={"down_proj": 128}, intermediate_size=128)
    save(model, tmp_path / "model")
    set_transforms(tmp_path / "model", config(head_dim=None))
    assert_same_model(load(tmp_path / "model"), model)
    assert blocks_of(load(tmp_path / "model")) == blocks_of(model)


def test_without_a_stored_matrix(directory: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.pop(MATRIX))
    assert_same_model(load(directory), rotated())


def test_a_matrix_at_every_layer(directory: Path) -> None:
    second = MATRIX.replace("layers.0", "layers.1")
    change_tensors(directory, lambda t: t.update({second: t[MATRIX].clone(), MATRIX: t[MATRIX].to(torch.float64)}))
    assert_same_model(load(directory), rotated())


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "fp8-dynamic"])
def test_what_compressed_tensors_writes(scheme: str, tmp_path: Path) -> None:
    """Transforms that compressed-tensors applies and saves itself, of weights and of inputs."""
    value = config(head_dim=16)
    model = tiny.build("llama")
    expected = logits(model)
    apply_transform_config(model, TransformConfig.model_validate(value))
    torch.testing.assert_close(logits(model), expected)
    foreign.write_compressed_tensors(model, scheme, tmp_path / "model")
    assert [name for name in tensors_of(tmp_path / "model") if "R4" in name] == [MATRIX]
    loaded = load(tmp_path / "model")
    assert [name for name, block in blocks_of(loaded).items() if block] == [DOWN, DOWN.replace("0", "1")]
    assert (logits(loaded) - expected).norm() < 0.15 * expected.norm()
    off = load(tmp_path / "model")
    for layer in (off.get_submodule(name) for name in (DOWN, DOWN.replace("0", "1"))):
        layer.rotate = 0
    assert (logits(off) - expected).norm() > (logits(loaded) - expected).norm() * 5


# What is refused.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (config(head_dim=0), "R4 has head_dim 0, expected one of 16, 32, 64, 128, 256"),
        (config(head_dim=-16), "R4 has head_dim -16"),
        (config(head_dim=48), "R4 has head_dim 48"),
        (config(head_dim=512), "R4 has head_dim 512"),
        (config(head_dim=8), "R4 has head_dim 8"),
        (config(head_dim=16.0), r"R4 has head_dim 16\.0"),
        (config(head_dim="16"), "R4 has head_dim '16'"),
        (config(head_dim=True), "R4 has head_dim True"),
        (config(head_dim=[16]), r"R4 has head_dim \[16\]"),
        (config(head_dim=None), "R4 rotates the input of .*down_proj, 112 wide, in blocks of 112, expected a divisor"),
        (config(type="random-hadamard"), "by a matrix of type 'random-hadamard', which is read by vLLM only"),
        (config(type="random-matrix"), "by a matrix of type 'random-matrix'"),
        (config(type=None), "R4 has the type 'None', expected 'hadamard'"),
        (config(randomize=True), "R4 has a transform of inputs at run time by randomized matrices"),
        (config(at("output")), "R4 has a transform of the outputs of layers at run time"),
        (config(at("q_attn", "re:.*self_attn$")), "R4 has a transform of the queries of attention at run time"),
        (config(at("k_cache", "re:.*self_attn$")), "R4 has a transform of the keys of attention at run time"),
        (config(at("inputs")), "R4 has the location 'inputs', expected 'input'"),
        (config(at(None)), "R4 has the location None"),
        (config(at(["input"])), r"R4 has the location \['input'\]"),
        (config({"targets": DOWNS}), "R4 has the location None"),
        (config(at("input"), at("output")), "R4 has a transform of the outputs of layers at run time"),
        (config(at("input"), at("input")), "the input of .*down_proj is transformed twice, by R4 and R4"),
        (config(at("input", ["Linear"], ignore=["lm_head"]), at("input")), "is transformed twice"),
        (config(at("input", 7)), "R4: targets is 7, expected a list"),
        (config(at("input", ["re:("])), r"R4: targets is \['re:\('\], expected a list"),
        (config(at("input", ignore={"a": 1})), "R4: ignore is .*, expected a list"),
        (config(at("input", scale=2)), "R4: apply has scale, which is not known"),
        (config(block_size=16), "R4 has block_size, which is not known"),
        (config() | {"version": 2}, "transform_config has version, which is not known"),
        ({"config_groups": {"R4": ["hadamard"]}}, r"R4 is \['hadamard'\], expected an object"),
        ({"config_groups": ["R4"]}, r"config_groups \['R4'\], expected an object"),
        (["R4"], r"transform_config is \['R4'\], expected an object"),
        (config(apply=DOWNS), "R4 has apply .*, expected a list"),
        (config(apply=[DOWNS]), "R4: apply is .*, expected an object"),
    ],
)  # fmt: skip
def test_other_transforms_are_refused(value: Any, message: str, directory: Path, tmp_path: Path) -> None:
    set_transforms(directory, value)
    assert_refused(directory, rf"{message}.*; quantize the original model with smoothquant-ext", tmp_path)


def test_blocks_that_do_not_divide_the_width(directory: Path, tmp_path: Path) -> None:
    set_transforms(directory, config(head_dim=32))
    change_tensors(directory, lambda tensors: tensors.update({MATRIX: hadamard(32).float()}))
    message = "R4 rotates the input of .*down_proj, 112 wide, in blocks of 32, expected a divisor among 16, 32"
    assert_refused(directory, message, tmp_path)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([DOWNS, "lm_head"], "R4 of its transform_config rotates at run time the input of lm_head, Linear in floating"),
        (["Linear"], "the input of lm_head, Linear in floating point"),
        ([DOWNS, "re:.*self_attn$"], r"the input of model\.layers\.0\.self_attn, LlamaAttention in floating point"),
        ([DOWNS, "re:.*norm"], "LlamaRMSNorm in floating point"),
        ([DOWNS, "Embedding"], r"the input of model\.embed_tokens, Embedding in floating point"),
        (["re:.*"], "in floating point"),
        (
            ["model.layers.7.mlp.down_proj"],
            r"inputs of model\.layers\.7\.mlp\.down_proj, which is the name of no 8-bit",
        ),
        (["re:.*down$", "re:.*fc2"], r"inputs of re:\.\*down\$, re:\.\*fc2, which is the name of no 8-bit layer here"),
    ],
)
def test_nothing_is_left_out(targets: list[str], message: str, directory: Path, tmp_path: Path) -> None:
    set_transforms(directory, config(at("input", targets)))
    assert_refused(directory, message, tmp_path)


def test_layers_in_floating_point(tmp_path: Path) -> None:
    names = [name for name in blocks_of(quantized()) if name != DOWN]
    save(quantized(names=names), tmp_path / "model")
    set_transforms(tmp_path / "model", config())
    assert_refused(tmp_path / "model", f"the input of {DOWN}, Linear in floating point", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda matrix: -matrix,
        lambda matrix: matrix / 4,
        lambda matrix: matrix.roll(1, 0),
        lambda matrix: torch.eye(16),
        lambda matrix: matrix * torch.nan,
        lambda matrix: hadamard(32).float(),
        lambda matrix: matrix[:8, :8].clone(),
        lambda matrix: matrix[:8].clone(),
        lambda matrix: matrix[None].clone(),
        lambda matrix: torch.ones(()),
        lambda matrix: torch.ones(0, 0),
    ],
)
def test_another_matrix_is_refused(change: Callable[[Tensor], Tensor], directory: Path, tmp_path: Path) -> None:
    change_tensors(directory, lambda tensors: tensors.update({MATRIX: change(tensors[MATRIX])}))
    assert_refused(
        directory, rf"{MATRIX}, .*, is not Sylvester's Hadamard matrix of 1 and -1 of the size 16,", tmp_path
    )


def test_a_matrix_as_wide_as_the_layer(directory: Path, tmp_path: Path) -> None:
    """As SpinQuant has it without a block size: it is Sylvester's, but too large, and not read."""
    set_transforms(directory, config(head_dim=None))
    change_tensors(directory, lambda tensors: tensors.update({MATRIX: torch.ones(1024, 1024)}))
    assert_refused(directory, rf"{MATRIX}, F32 \[1024, 1024\], .* of the size 16 or 32 or 64 or 128 or 256", tmp_path)


def test_a_matrix_that_nothing_uses_is_not_overlooked(directory: Path) -> None:
    set_transforms(directory, None)
    with pytest.raises(SmoothQuantError, match="R4_input"):
        load(directory)


def test_a_model_in_floating_point(tmp_path: Path) -> None:
    from tiny_text import tiny_tokenizer

    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    only = {"quant_method": "compressed-tensors", "transform_config": config(at("weight_input"), at("weight_output"))}
    change_config(tmp_path / "model", lambda c: c.update(quantization_config=only))
    with pytest.warns(UserWarning, match="no weights are quantized, and rotations are in the weights"):
        loaded, _ = load_model(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    change_config(tmp_path / "model", lambda c: c.update(quantization_config=only | {"transform_config": config()}))
    with pytest.raises(SmoothQuantError, match="inputs are rotated at run time and no weights are quantized"):
        load_model(tmp_path / "model")
    with pytest.raises(SmoothQuantError, match="inputs are rotated at run time and no weights are quantized"):
        through_transformers(tmp_path / "model")


# Experts.


def test_experts_of_others_are_rotated(tmp_path: Path) -> None:
    model = rotated_mixture("qwen2_moe")
    save(model, tmp_path / "model")
    for target in (r"re:.*experts\.\d+\.down_proj$", r"re:.*\.[0-9]\.down_proj"):
        set_transforms(tmp_path / "model", config(at("input", [target])))
        assert blocks_of(load(tmp_path / "model")) == blocks_of(model)


def test_all_inputs_of_experts_of_others_are_rotated(tmp_path: Path) -> None:
    save(rotated_mixture("qwen2_moe"), tmp_path / "model")
    set_transforms(tmp_path / "model", config(at("input", [r"re:.*experts\.\d+\.\w+_proj$"])))
    blocks = blocks_of(load(tmp_path / "model"))
    assert [each for name, each in blocks.items() if name.endswith("experts")] == [(16, 16)] * 2


@pytest.mark.parametrize(
    "targets",
    [
        [r"re:.*experts\.\d+\.(down|up)_proj$"],
        [r"re:.*experts\.[0-2]\.down_proj$"],
        [r"re:.*experts\.\d+\.gate_proj$"],
    ],
)
def test_experts_that_cannot_be_rotated(targets: list[str], tmp_path: Path) -> None:
    save(rotated_mixture("qwen2_moe"), tmp_path / "model")
    set_transforms(tmp_path / "model", config(at("input", targets)))
    assert_refused(
        tmp_path / "model",
        "inputs of the experts .* in blocks of different sizes, or some are not, which is not supported",
        tmp_path,
    )


def test_a_router_may_have_been_a_linear_layer(tmp_path: Path) -> None:
    save(rotated_mixture("qwen2_moe"), tmp_path / "model")
    set_transforms(tmp_path / "model", config(at("input", [r"re:.*\d\.down_proj$", r"re:.*mlp\.gate$"])))
    assert_refused(tmp_path / "model", r"the input of model\.layers\.0\.mlp\.gate, \w+ in floating point", tmp_path)


# The rule by itself.


def test_targets_are_the_shortest_that_mean_no_other() -> None:
    names = [f"model.layers.{i}.mlp.experts.{e}.{leaf}" for i in range(12) for e in range(3) for leaf in ("up", "down")]
    names += [f"model.layers.{i}.mlp.down" for i in range(12)]
    wanted = {
        "all": ({name for name in names if name.endswith("down")}, [r"re:(.*\.)?down$"]),
        "experts": ({name for name in names if name.endswith("down") and "experts" in name}, [r"re:(.*\.)?\d+\.down$"]),
        "dense": ({name for name in names if name.endswith("mlp.down")}, [r"re:(.*\.)?mlp\.down$"]),
        "one": ({"model.layers.1.mlp.down"}, [r"re:(.*\.)?1\.mlp\.down$"]),
        "module": ({n for n in names if ".1.mlp.experts" in n and n.endswith("down")},
                   [r"re:(.*\.)?1\.mlp\.experts\.\d+\.down$"]),
    }  # fmt: skip
    for rotated_names, targets in wanted.values():
        blocks = {name: 16 * (name in rotated_names) for name in names}
        written = transform_config(blocks, ["lm_head"])
        assert written["config_groups"]["R4"]["apply"][0]["targets"] == targets
        (transform,) = parse_transforms(written, "config.json")
        assert {name for name in [*names, "lm_head"] if transform.means((name,))} == rotated_names


def test_other_modules_are_not_meant() -> None:
    written = transform_config({"a.mlp.down": 16, "a.down": 0, "a.down.mlp": 0}, [])
    assert written["config_groups"]["R4"]["apply"][0]["targets"] == [r"re:(.*\.)?mlp\.down$"]


def test_a_name_that_is_the_end_of_another() -> None:
    written = transform_config({"down": 16, "a.down": 0}, [])
    assert written["config_groups"]["R4"]["apply"][0]["targets"] == ["down"]
    assert transform_config({"a": 0}, ["b"]) == {}
    assert transform_config({}, []) == {}


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_the_matrix_is_compressed_tensors_own(block: int) -> None:
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    assert is_sylvester(deterministic_hadamard_matrix(block))
    assert not is_sylvester(-deterministic_hadamard_matrix(block))


def test_weights_in_other_bits_are_named_first() -> None:
    """Then transformers' own class may load it."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    whole = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    with pytest.raises(SmoothQuantError, match="packed into int32"):
        parse_quantization_config(whole | {"transform_config": config(type="random-matrix")}, "config.json")
