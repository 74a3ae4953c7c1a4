"""Models that are rotated at run time: what is written comes back, and means the same to compressed-tensors."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_vision
import torch
from command_line import complaint
from compressed_tensors.transform import TransformConfig, apply_transform_config
from compressed_tensors.utils import is_match
from stored_files import change_tensors, tensors_of
from tiny_rotated import blocks_of, rotated, rotated_mixture
from tiny_text import tiny_tokenizer
from tiny_w8a8 import IDS, assert_same_model, config_of, layers_of, logits, quantized, same_bits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from smoothquant_ext import Recipe, disable, enable, load, quantize, save
from smoothquant_ext.checkpoint.converting import convert
from smoothquant_ext.checkpoint.formats.base import EXPERTS, LAYERS
from smoothquant_ext.checkpoint.formats.registry import choose_format, written_formats
from smoothquant_ext.checkpoint.formats.transforms import transform_config
from smoothquant_ext.checkpoint.model_card import add_measured
from smoothquant_ext.checkpoint.reading import read_checkpoint
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.hadamard import hadamard, rotate_blocks
from smoothquant_ext.quantization.convert import convert_
from smoothquant_ext.scheme import SCHEMES

DOWN_0 = "model.layers.0.mlp.down_proj"
MIXED = {"layers.0.mlp.down_proj": 128, "layers.1.mlp.down_proj": 64, r"layers.1.*o_proj": 16}
ALL = {"down_proj": 128, r"layers": 64}


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    disable()
    yield
    disable()


def assert_comes_back(model: PreTrainedModel, directory: Path) -> dict[str, Any]:
    """Saves and loads the model; the ``transform_config`` that was written."""
    save(model, directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(directory)
    assert blocks_of(loaded) == blocks_of(model)
    assert_same_model(loaded, model)
    written: dict[str, Any] = config_of(directory)["quantization_config"]["transform_config"]
    return written


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static"])
@pytest.mark.parametrize(
    ("model_type", "target"),
    [("llama", r"re:(.*\.)?down_proj$"), ("opt", r"re:(.*\.)?fc2$"), ("gpt2", r"re:(.*\.)?mlp\.c_proj$")],
)
def test_a_rotated_model_comes_back_to_the_bit(model_type: str, target: str, scheme: str, tmp_path: Path) -> None:
    model = rotated(model_type, scheme)
    written = assert_comes_back(model, tmp_path / "model")
    assert written == {
        "config_groups": {
            "R4": {
                "type": "hadamard",
                "apply": [{"targets": [target], "location": "input", "inverse": False, "ignore": []}],
                "randomize": False,
                "requires_grad": False,
                "head_dim": 16,
                "precision": "torch.float32",
            }
        }
    }
    matrices = {name: t for name, t in tensors_of(tmp_path / "model").items() if "R4" in name}
    first = next(name for name, block in blocks_of(model).items() if block)
    assert list(matrices) == [f"{first}.R4_input.weight"]
    assert torch.equal(matrices[f"{first}.R4_input.weight"], hadamard(16).float())


def test_several_sizes_and_some_layers(tmp_path: Path) -> None:
    model = rotated(blocks=MIXED, intermediate_size=256)
    groups = assert_comes_back(model, tmp_path / "model")["config_groups"]
    targets = {group: value["apply"][0]["targets"] for group, value in groups.items()}
    assert targets == {
        "R4_16": [r"re:(.*\.)?1\.self_attn\.o_proj$"],
        "R4_64": [r"re:(.*\.)?1\.mlp\.down_proj$"],
        "R4_128": [r"re:(.*\.)?0\.mlp\.down_proj$"],
    }
    assert {group: value["head_dim"] for group, value in groups.items()} == {"R4_16": 16, "R4_64": 64, "R4_128": 128}
    assert len([name for name in tensors_of(tmp_path / "model") if "_input.weight" in name]) == 3


def test_layers_that_share_an_input(tmp_path: Path) -> None:
    model = rotated(blocks={"[qkv]_proj": 64, "gate_proj|up_proj": 32, "o_proj": 16, "down_proj": 16})
    assert set(blocks_of(model).values()) == {64, 32, 16}
    assert_comes_back(model, tmp_path / "model")


@pytest.mark.parametrize("of_vision", [False, True])
def test_a_model_whose_names_differ_between_modules_and_files(of_vision: bool, tmp_path: Path) -> None:
    model = tiny_vision.build("qwen2_5_vl")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    layers = [name for name in layers if of_vision or "visual" not in name]
    convert_(model, layers, {}, SCHEMES["int8"])
    for name, layer in layers_of(model).items():
        layer.rotate = 16 * ("language_model" in name and name.endswith("down_proj"))
    fuse_(model)
    written = assert_comes_back(model, tmp_path / "model")
    targets = written["config_groups"]["R4"]["apply"][0]["targets"]
    linear = nn.Linear(1, 1)
    for layer in ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj"):
        for prefix in ("model.", "model.language_model.", "language_model.model."):  # of files, here, and in vLLM
            assert is_match(prefix + layer, linear, targets)
    for prefix in ("visual.", "model.visual."):
        assert not is_match(f"{prefix}blocks.0.mlp.down_proj", linear, targets)
    convert(tmp_path / "model", tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "llama4_text", "granitemoe"])
def test_rotated_experts_are_stored_so_that_nobody_else_loads_them(name: str, tmp_path: Path) -> None:
    model = rotated_mixture(name)
    assert_comes_back(model, tmp_path / "model")
    assert config_of(tmp_path / "model")["quantization_config"]["quantization_status"] == "smoothed"
    with pytest.raises(Exception, match=r"smoothed|status"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(
        SmoothQuantError,
        match=r"'compressed-tensors' has no place for rotations of experts at run time, which --rotate",
    ):
        save(model, tmp_path / "other", format="compressed-tensors")
    assert not (tmp_path / "other").exists()
    convert(tmp_path / "model", tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")


def test_experts_and_dense_layers_in_blocks_of_two_sizes(tmp_path: Path) -> None:
    model = rotated_mixture("qwen2_moe", 16, dense=16)
    written = assert_comes_back(model, tmp_path / "model")
    assert written["config_groups"]["R4"]["apply"][0]["targets"] == [r"re:(.*\.)?down_proj$"]


@pytest.mark.parametrize(
    "model_type", ["bloom", "deepseek_v3-moe", "falcon-new", "gpt2", "llama", "mixtral", "opt", "phi3", "qwen2_moe"]
)
@pytest.mark.parametrize("rotate", ["down", "inputs"])
def test_what_quantize_rotates_comes_back_to_the_bit(rotate: str, model_type: str, tmp_path: Path) -> None:
    model = quantize(tiny.build(model_type), [IDS], Recipe("int8", rotate=rotate), progress=False)
    assert any(blocks_of(model).values())
    assert_comes_back(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")


def test_the_first_model_of_a_process_may_be_a_rotated_one(tmp_path: Path) -> None:
    """transformers builds it with ``meta`` as the default device, and the first Hadamard matrix is made then."""
    model = rotated()
    save(model, tmp_path / "model")
    hadamard.cache_clear()
    enable()
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


# Other formats.


@pytest.mark.parametrize("write", ["save", "convert"])
def test_formats_without_rotations_refuse(write: str, tmp_path: Path) -> None:
    save(rotated(), tmp_path / "model")
    target = tmp_path / "other"
    message = (
        "format 'lmdeploy' has no place for rotations of layers at run time, which --rotate residual,heads does "
        "without; use format 'smoothquant-ext' or another recipe"
    )
    if write == "convert":
        said = complaint("convert", tmp_path / "model", "-o", target, "--format", "lmdeploy")
        assert message in said
    else:
        with pytest.raises(SmoothQuantError, match=re.escape(message)):
            save(rotated(), target, format="lmdeploy")
    assert not target.exists()


def test_the_command_refuses_before_the_work(tmp_path: Path) -> None:
    command = ("quantize", tmp_path / "no-such-model", "-o", tmp_path / "out", "--format", "lmdeploy")
    for rotate in ("down", "auto", "residual,down"):
        assert "format 'lmdeploy' has no place for rotations" in complaint(*command, "--rotate", rotate)
    for rotate in ([], ["--rotate", "residual,heads"], ["--rotate", "auto", "--scheme", "fp8-e5m2"], ["--fast"]):
        assert "no-such-model is neither a directory" in complaint(*command, *rotate)


def test_the_command_refuses_experts_before_the_work(tmp_path: Path) -> None:
    tiny.build("mixtral").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    command = ("quantize", tmp_path / "model", "-o", tmp_path / "out", "--calib", tmp_path / "no-such-text")
    said = complaint(*command, "--rotate", "auto", "--format", "compressed-tensors")
    assert "has no place for rotations of experts at run time, which --rotate residual,heads does without" in said
    for options in (["--format", "compressed-tensors"], ["--rotate", "auto"]):
        assert "no-such-text" in complaint(*command, *options)


def test_every_written_format_stores_rotations_or_refuses() -> None:
    for name, fmt in written_formats().items():
        for part in (LAYERS, EXPERTS):
            can = not fmt.cannot_store([SCHEMES["int8"]], explicit=False, rotated=[part])
            assert can == (part in fmt.rotates)
            blocks = {"a.0.b": 16, "a.b": 0}
            assert bool(fmt.rotation_config(blocks, [])) == bool(fmt.matrices(blocks)) == bool(fmt.rotates), name
            assert not fmt.rotation_config(dict.fromkeys(blocks, 0), [])
    with pytest.raises(SmoothQuantError, match=r"'compressed-tensors' cannot store .*'lmdeploy' has no place for r"):
        choose_format(None, [SCHEMES["fp8-e5m2"]], rotated=[LAYERS])


def test_conversion_between_names_of_one_format(tmp_path: Path) -> None:
    model = rotated(blocks=MIXED, intermediate_size=256)
    save(model, tmp_path / "model", max_shard_size=40_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    convert(tmp_path / "model", tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), model)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")
    left, right = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "model")
    assert left.keys() == right.keys()
    assert all(same_bits(left[name], right[name]) for name in left)
    convert(tmp_path / "model", tmp_path / "explicit", "smoothquant-ext")
    assert_same_model(load(tmp_path / "explicit"), model)


def test_layers_that_the_class_does_not_know_are_rotated_too(tmp_path: Path) -> None:
    """As those for multi-token prediction, which conversion copies."""
    model = rotated()
    save(model, tmp_path / "model")
    own = tensors_of(tmp_path / "model")
    more = {f"mtp.mlp.down_proj.{end}": own[f"{DOWN_0}.{end}"].clone() for end in ("weight", "weight_scale")}
    change_tensors(tmp_path / "model", lambda tensors: tensors.update(more))
    convert(tmp_path / "model", tmp_path / "again")
    assert more.keys() <= tensors_of(tmp_path / "again").keys()
    assert read_checkpoint(tmp_path / "again").layers["mtp.mlp.down_proj"].rotate == 16
    assert_same_model(load(tmp_path / "again", drop=["mtp.*"]), model)


# In use.


def test_it_is_saved_again_as_it_was_loaded(tmp_path: Path) -> None:
    model = rotated(blocks=MIXED, intermediate_size=256)
    save(model, tmp_path / "model")
    save(load(tmp_path / "model"), tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path / "model").keys()


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"dtype": torch.bfloat16}])
def test_through_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    model = rotated()
    save(model, tmp_path / "model")
    enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert blocks_of(loaded) == blocks_of(model)
    if "dtype" not in options:
        assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), loaded)
    written = [config_of(tmp_path / name)["quantization_config"]["transform_config"] for name in ("again", "model")]
    assert written[0] == written[1]


def test_copies_keep_the_rotation(tmp_path: Path) -> None:
    model = rotated()
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    layer = layers_of(model)[DOWN_0]
    x = torch.randn(3, 112)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.rotate == 16
        assert torch.equal(other(x), layer(x))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    with torch.no_grad():
        for part in layers_of(loaded).values():
            part.weight.zero_()
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded), expected)


def test_experts_keep_the_rotation() -> None:
    model = rotated_mixture("qwen2_moe")
    assert blocks_of(copy.deepcopy(model)) == blocks_of(model)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_adapters_read_what_is_not_rotated(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save(rotated(), tmp_path / "model")
    enable()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    layer = adapted.get_submodule(f"base_model.model.{DOWN_0}")
    x = torch.randn(3, 112)
    scaling = layer.scaling["default"]
    with torch.no_grad():
        expected = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * scaling
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(logits(adapted), before)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before)


def test_the_model_card_says_what_is_rotated(tmp_path: Path) -> None:
    save(rotated(blocks=MIXED, intermediate_size=256), tmp_path / "model", format="compressed-tensors")
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        "Rotated at run time by a Hadamard matrix: the input of 1 layer in blocks of 16; the input of 1 layer in "
        "blocks of 64; the input of 1 layer in blocks of 128.\n\n## Run it" in card
    )
    assert "do not\nread `transform_config`: their output is nonsense" in card
    assert "SGLang run" not in card
    save(rotated_mixture("qwen2_moe"), tmp_path / "mixture")
    card = (tmp_path / "mixture" / "README.md").read_text()
    assert "the inputs of 8 layers in blocks of 16.\n" in card
    assert "smoothed or rotated at run time, as only smoothquant-ext does. Other engines refuse it" in card
    save(quantized(), tmp_path / "plain")
    assert "otated" not in (tmp_path / "plain" / "README.md").read_text()


def test_measurements_keep_the_line_in_the_card(tmp_path: Path) -> None:
    model = quantize(tiny.build("llama"), [IDS], Recipe("int8", smooth=False), progress=False)
    layers_of(model)[DOWN_0].rotate = 16
    save(model, tmp_path / "model")
    add_measured(tmp_path / "model", [])
    assert "the input of 1 layer in blocks of 16." in (tmp_path / "model" / "README.md").read_text()


# With compressed-tensors' own transforms, as docs/formats.md says.


def loaded_by_transformers(directory: Path, **options: Any) -> tuple[PreTrainedModel, Tensor]:
    """The model with compressed-tensors' transforms, as docs/formats.md applies them, and its logits without them."""
    wrong = logits(AutoModelForCausalLM.from_pretrained(directory, **options))
    theirs = AutoModelForCausalLM.from_pretrained(directory, **options)
    written = config_of(directory)["quantization_config"]["transform_config"]
    apply_transform_config(theirs, TransformConfig.model_validate(written))
    return theirs, wrong


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
@pytest.mark.parametrize("blocks", [MIXED, ALL], ids=["down", "inputs"])
def test_transformers_with_compressed_tensors_own_transforms(
    blocks: Mapping[str, int], scheme: str, tmp_path: Path
) -> None:
    """Theirs rounds inputs to 255 steps where ours has 254, so the outputs differ as two roundings do."""
    model = rotated(scheme=scheme, blocks=blocks, intermediate_size=256)
    save(model, tmp_path / "model", format="compressed-tensors")
    theirs, wrong = loaded_by_transformers(tmp_path / "model")
    exact = logits(tiny.build("llama", intermediate_size=256))
    rounding = (logits(model) - exact).norm()
    assert (logits(theirs) - exact).norm() < 2 * rounding
    assert (wrong - exact).norm() > 10 * rounding
    matrices = {name: tensor for name, tensor in tensors_of(tmp_path / "model").items() if "R4" in name}
    assert len(matrices) == len({layer.rotate for layer in layers_of(model).values()} - {0})
    assert all(torch.equal(matrix, theirs.get_parameter(name)) for name, matrix in matrices.items())


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_their_transforms_undo_the_rotation_of_the_weights(model_type: str, tmp_path: Path) -> None:
    model = rotated(model_type)
    save(model, tmp_path / "model", format="compressed-tensors")
    theirs, _ = loaded_by_transformers(tmp_path / "model", quantization_config=CompressedTensorsConfig(dequantize=True))
    expected = tiny.build(model_type)
    for name, layer in layers_of(model).items():
        weight = layer.plain_weight().double() * layer._plain_scale().double()
        expected.get_submodule(name).weight.data = rotate_blocks(weight, layer.rotate).float()
    torch.testing.assert_close(logits(theirs), logits(expected))


def test_the_targets_mean_the_same_layers_under_the_names_of_others() -> None:
    """vLLM compares them with its own names, which it does not translate."""
    names = {f"model.language_model.layers.{i}.mlp.{leaf}": 32 * (leaf == "down_proj") for i in (0, 1, 10, 11)
             for leaf in ("up_proj", "down_proj")} | {"model.visual.blocks.0.mlp.down_proj": 0}  # fmt: skip
    (group,) = transform_config(names, ["lm_head"])["config_groups"].values()
    (applied,) = group["apply"]
    linear = nn.Linear(1, 1)
    for name, block in names.items():
        for theirs in (name, name.replace("model.language_model.", "language_model.model.")):
            assert is_match(theirs, linear, applied["targets"], applied["ignore"]) == bool(block)
    assert not is_match("lm_head", linear, applied["targets"], applied["ignore"])
