"""Checkpoints with several groups, or with names of modules in their configuration, written by compressed-tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import tiny_vision
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_w8a8 import quantized
from torch import nn
from transformers import AutoModelForImageTextToText

from smoothquant_ext import disable, enable, load, save
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.scheme import Scheme

pytest.importorskip("compressed_tensors")
DOWN = r"re:.*down_proj"
INT8, FLOAT = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
Group = dict[str, Any]


def group(target: str, kind: dict[str, Any], weight: str = "channel", static: bool = False) -> Group:
    activation = {"strategy": "tensor"} if static else {"strategy": "token", "dynamic": True}
    return {"targets": [target], "weights": kind | {"strategy": weight}, "input_activations": kind | activation}


def change_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the ``quantization_config`` of config.json."""
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def assert_weights(model: nn.Module, dequantized: foreign.Weights) -> dict[str, Scheme]:
    """The 8-bit layers are those that were written, to the bit; their schemes."""
    layers = quantized_layers(model)
    assert set(layers) == set(dequantized)
    for name, layer in layers.items():
        weight = layer.plain_weight().float() * layer._plain_scale()
        torch.testing.assert_close(weight, dequantized[name], rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    return {name: layer.scheme for name, layer in layers.items()}


OTHERS = {
    "fp8": group(DOWN, FLOAT),
    "per tensor": group(DOWN, INT8, weight="tensor"),
    "static": group(DOWN, INT8, static=True),
    "one of two that share an input": group(r"re:.*(q|gate)_proj", FLOAT),
    "the other": group(r"re:.*(v|up)_proj", FLOAT),
    "fp8 static by name": group("model.layers.1.mlp.down_proj", FLOAT, weight="tensor", static=True),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", ["class", "name"])
def test_a_name_or_pattern_goes_before_a_class(first: str, other: str, tmp_path: Path) -> None:
    groups = [group("Linear", INT8), OTHERS[other]]
    ordered = dict(zip(("group_0", "group_1"), groups if first == "class" else groups[::-1], strict=True))
    model = tiny.build("llama")
    dequantized = foreign.write_compressed_tensors(model, "int8-dynamic", tmp_path / "model", config_groups=ordered)
    loaded = load(tmp_path / "model")
    schemes = assert_weights(loaded, dequantized)
    special = {name for name, scheme in schemes.items() if scheme.name != "int8"}
    (target,) = OTHERS[other]["targets"]
    assert special == {name for name in schemes if re.match(target.removeprefix("re:"), name)}
    with torch.no_grad():
        ours, theirs = loaded(foreign.IDS).logits, model(foreign.IDS).logits  # compressed-tensors dequantizes its own
    assert (ours - theirs).norm() < 0.15 * theirs.norm()


def test_a_head_with_a_group_of_its_own(tmp_path: Path) -> None:
    groups = {"group_0": group("Linear", INT8), "group_1": group("lm_head", FLOAT)}
    dequantized = foreign.write_compressed_tensors(
        tiny.build("llama"), "int8-dynamic", tmp_path / "model", config_groups=groups, ignore=[]
    )
    assert "lm_head" in dequantized
    schemes = assert_weights(load(tmp_path / "model"), dequantized)
    assert {name for name, scheme in schemes.items() if scheme.name == "fp8"} == {"lm_head"}


@pytest.mark.parametrize(("broad", "first"), [(r"re:.*[a-z]_proj", "narrow"), (r"re:.*proj", "broad")])
def test_where_two_patterns_match_the_files_decide(broad: str, first: str, tmp_path: Path) -> None:
    """compressed-tensors tries patterns in alphabetical order, vLLM in that of the file: both kinds are loaded."""
    groups = {"group_0": group(r"re:.*proj", INT8), "group_1": group(DOWN, FLOAT)}
    dequantized = foreign.write_compressed_tensors(
        tiny.build("llama"), "int8-dynamic", tmp_path / "model", config_groups=groups
    )

    def reorder(config: dict[str, Any]) -> None:
        both = {"broad": group(broad, INT8) | {"format": "int-quantized"}}
        both["narrow"] = group(DOWN, FLOAT) | {"format": "float-quantized"}
        config["config_groups"] = {name: both[name] for name in sorted(both, key=lambda name: name != first)}

    change_config(tmp_path / "model", reorder)
    schemes = assert_weights(load(tmp_path / "model"), dequantized)
    assert {name for name, scheme in schemes.items() if scheme.name == "fp8"} == {n for n in schemes if "down" in n}


def test_a_weight_that_no_group_means_is_refused(tmp_path: Path) -> None:
    foreign.write_compressed_tensors(tiny.build("llama"), "int8-dynamic", tmp_path / "model")
    change_config(tmp_path / "model", lambda config: config["config_groups"]["group_0"].update(targets=[r"re:.*mlp.*"]))
    with pytest.raises(
        SmoothQuantError, match=r"layers\.0\.self_attn\.\w+ is quantized but config\.json says it is not"
    ):
        load(tmp_path / "model")


# Names of modules and of tensors.


@pytest.fixture
def enabled() -> Iterator[None]:
    enable()
    yield
    disable()


def names_in(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as handle:
        return set(handle.keys())


IGNORES = {
    "as written": None,
    "names in the files": lambda names: [name.removeprefix("model.") for name in names],
    "a pattern of modules": lambda _: [r"re:^model\.visual\.", r"re:.*lm_head"],
    "a pattern of tensors": lambda _: [r"re:^visual\..*", "lm_head"],
    "the parent module": lambda _: ["model.visual", "lm_head"],
    "the parent in the files": lambda _: ["visual", "lm_head", "model.layers.99.mlp.up_proj"],
}


@pytest.mark.parametrize("model_type", tiny_vision.VISION)
@pytest.mark.parametrize("ignore", IGNORES)
@pytest.mark.usefixtures("enabled")
def test_names_of_modules_and_of_tensors_are_ignored(ignore: str, model_type: str, tmp_path: Path) -> None:
    model = tiny_vision.build(model_type)
    dequantized = foreign.write_compressed_tensors(
        model, "int8-dynamic", tmp_path / "model", ignore=["re:.*lm_head", "re:model.visual.*"]
    )
    stored = names_in(tmp_path / "model")
    assert any(name.startswith("visual.") for name in stored)
    assert not any(name.startswith(("model.visual.", "model.language_model.")) for name in stored)
    if (make := IGNORES[ignore]) is not None:
        change_config(tmp_path / "model", lambda config: config.update(ignore=make(config["ignore"])))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert_weights(loaded, dequantized)
    with torch.no_grad():
        ours, theirs = loaded(foreign.IDS).logits, model(foreign.IDS).logits
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize(
    "target", [r"re:^model\.language_model\.layers", r"re:^model\.layers", r"re:^language_model\.model\.layers"]
)
@pytest.mark.usefixtures("enabled")
def test_names_of_modules_and_of_tensors_are_targeted(target: str, tmp_path: Path) -> None:
    """The first is the name of a module, the second that of a tensor, the third what other versions call both."""
    dequantized = foreign.write_compressed_tensors(
        tiny_vision.build("qwen2_vl"),
        "int8-dynamic",
        tmp_path / "model",
        config_groups={"group_0": group(r"re:^model\.language_model\.layers", FLOAT)},
        ignore=[],
    )
    change_config(tmp_path / "model", lambda config: config["config_groups"]["group_0"].update(targets=[target]))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert {scheme.name for scheme in assert_weights(loaded, dequantized).values()} == {"fp8"}


def test_the_names_of_a_mixture_are_those_of_modules_or_of_tensors(tmp_path: Path) -> None:
    """The files say block_sparse_moe.experts.0.w1 and block_sparse_moe.gate, the modules mlp.experts and mlp.gate."""
    model = quantized("mixtral", names=["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"])
    save(model, tmp_path / "model")
    assert "model.layers.0.block_sparse_moe.gate.weight" in names_in(tmp_path / "model")

    def name_modules(config: dict[str, Any]) -> None:
        (only,) = config["config_groups"].values()
        only["targets"] = ["Linear"]
        floats = [r"re:.*\.mlp\.gate$", r"re:.*\.mlp\.experts\..*", "lm_head"]
        attention = [rf"re:.*layers\.{layer}\..*[{skip}]_proj" for layer, skip in ((0, "kvo"), (1, "qkv"))]
        config["ignore"] = [*floats, *attention]

    change_config(tmp_path / "model", name_modules)
    loaded = load(tmp_path / "model")
    assert set(quantized_layers(loaded)) == set(quantized_layers(model))
    change_config(tmp_path / "model", lambda config: config["ignore"].remove(r"re:.*\.mlp\.experts\..*"))
    with pytest.raises(SmoothQuantError, match=r"says .*moe\.experts\.0\.w1 is quantized, but its weight is F32"):
        load(tmp_path / "model")


@pytest.mark.usefixtures("enabled")
def test_names_that_truly_disagree_are_refused(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    foreign.write_compressed_tensors(
        tiny_vision.build("qwen2_vl"), "int8-dynamic", directory, ignore=["re:.*lm_head", "re:model.visual.*"]
    )
    name = "model.language_model.layers.0.mlp.up_proj"  # its tensor is model.layers.0.mlp.up_proj.weight
    change_config(directory, lambda config: config["ignore"].append(name))
    with pytest.raises(
        SmoothQuantError, match=r"model\.layers\.0\.mlp\.up_proj is quantized but config\.json says it is"
    ):
        AutoModelForImageTextToText.from_pretrained(directory)
    change_config(directory, lambda config: config.update(ignore=["lm_head"]))
    with pytest.raises(SmoothQuantError, match=r"config\.json says visual\.\S+ is quantized, but its weight is F32"):
        AutoModelForImageTextToText.from_pretrained(directory)


# Attention and the cache.

CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KEPT = "kept in floating point"
ATTENTION = {
    "attention": ({"targets": ["LlamaAttention"], "input_activations": CACHE}, "only inputs of LlamaAttention"),
    "by pattern": ({"targets": [r"re:.*self_attn$"], "input_activations": CACHE}, "only inputs of re:"),
    "keys and values": ({"targets": [r"re:.*(k|v)_proj"], "output_activations": CACHE}, "only outputs of re:"),
    "both": (
        {"targets": ["Foo"], "input_activations": CACHE, "output_activations": CACHE},
        "inputs and outputs of Foo",
    ),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_groups_for_attention_are_ignored_with_a_sentence(kind: str, tmp_path: Path) -> None:
    dequantized = foreign.write_compressed_tensors(tiny.build("llama"), "int8-dynamic", tmp_path / "model")
    extra, sentence = ATTENTION[kind]
    change_config(tmp_path / "model", lambda config: config["config_groups"].update(group_1={"weights": None} | extra))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(tmp_path / "model")
    (warning,) = [str(w.message) for w in caught]
    assert warning.startswith(f"{tmp_path / 'model'}: group_1 quantizes no weights, ")
    assert sentence in warning
    assert warning.endswith(KEPT)
    assert_weights(loaded, dequantized)


def test_outputs_of_layers_are_ignored_with_a_sentence(tmp_path: Path) -> None:
    dequantized = foreign.write_compressed_tensors(tiny.build("llama"), "int8-static", tmp_path / "model")
    change_config(tmp_path / "model", lambda config: config["config_groups"]["group_0"].update(output_activations=INT8))
    with pytest.warns(UserWarning, match=rf"the outputs of the layers of group_0 are {KEPT}, not in 8 bits"):
        assert_weights(load(tmp_path / "model"), dequantized)


def test_a_group_without_weights_leaves_its_layers_in_floating_point(tmp_path: Path) -> None:
    """What compressed-tensors writes for it: the pattern goes before the class, so these weights stay as they are."""
    groups = {"group_0": group("Linear", INT8)}
    dequantized = foreign.write_compressed_tensors(
        tiny.build("llama"), "int8-dynamic", tmp_path / "model", config_groups=groups, ignore=["lm_head", DOWN]
    )
    outputs = {"targets": [DOWN], "weights": None, "output_activations": CACHE}
    change_config(
        tmp_path / "model",
        lambda config: (config.update(ignore=["lm_head"]), config["config_groups"].update(group_1=outputs)),
    )
    with pytest.warns(UserWarning, match=KEPT):
        assert_weights(load(tmp_path / "model"), dequantized)


def test_a_lost_weight_is_still_refused(tmp_path: Path) -> None:
    foreign.write_compressed_tensors(tiny.build("llama"), "int8-dynamic", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    del tensors[f"{name}_scale"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SmoothQuantError, match=r"says model\.layers\.0\.mlp\.up_proj is quantized, but its weight is F32"
    ):
        load(tmp_path / "model")
