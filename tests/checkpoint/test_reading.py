"""Checkpoints that are damaged, inconsistent or somebody else's: one sentence each, before any model is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stored_files import change_config, change_tensors
from tiny_w8a8 import assert_same_model, layers_of, logits, quantized
from torch import Tensor

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.reading import read_checkpoint
from smoothquant_ext.errors import SmoothQuantError

UP = "model.layers.0.mlp.up_proj"
Change = Callable[[dict[str, Tensor]], Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pristine")
    saving.save(quantized("qwen2", "int8-static"), root / "static")
    saving.save(quantized("qwen2", "int8"), root / "dynamic")
    saving.save(quantized("qwen2", "int8"), root / "lmdeploy", format="lmdeploy")
    saving.save(quantized("qwen2", "int8"), root / "shards", max_shard_size="30KB")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copies(pristine: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(pristine[name], tmp_path / name))


def assign(**values: Tensor) -> Change:
    """Sets tensors of one layer: suffix=value."""
    return lambda tensors: tensors.update({f"{UP}.{suffix}": value for suffix, value in values.items()})


def remove(suffix: str) -> Change:
    return lambda tensors: tensors.pop(f"{UP}.{suffix}")


DAMAGED_TENSORS = {
    "scale missing": ("static", remove("weight_scale"), "up_proj.weight is I8 but .*up_proj.weight_scale is missing"),
    "weight missing": ("static", remove("weight"), "up_proj.weight_scale is stored but .*up_proj.weight is missing"),
    "input scale missing": (
        "static",
        remove("input_scale"),
        "activations are static but .*up_proj.input_scale is missing",
    ),
    "scale of the wrong shape": (
        "static",
        assign(weight_scale=torch.ones(64, 1)),
        r"up_proj\.weight_scale is F32 \[64, 1\], expected a float \[112, 1\]",
    ),
    "scale of one group per row": (
        "static",
        assign(weight_scale=torch.ones(112, 2)),
        r"weight_scale is F32 \[112, 2\], expected a float \[112, 1\]",
    ),
    "scale that is not a float": (
        "static",
        assign(weight_scale=torch.ones(112, 1, dtype=torch.int32)),
        r"weight_scale is I32 \[112, 1\], expected a float",
    ),
    "input scale of the wrong shape": ("static", assign(input_scale=torch.ones(2)), r"input_scale is F32 \[2\]"),
    "NaN scale": ("static", assign(weight_scale=torch.full((112, 1), torch.nan)), "weight_scale holds nan at row 0"),
    "zero scale": (
        "dynamic",
        assign(weight_scale=torch.zeros(112, 1)),
        r"weight_scale holds 0\.0 at row 0, expected positive finite numbers, or 0 for a row of zeros",
    ),
    "infinite input scale": ("static", assign(input_scale=torch.tensor([torch.inf])), "input_scale holds inf"),
    "zero point": (
        "static",
        assign(weight_zero_point=torch.ones(112, 1, dtype=torch.int8)),
        "weight_zero_point is not zero, expected symmetric quantization",
    ),
    "weight of another dtype": (
        "static",
        assign(weight=torch.ones(112, 64, dtype=torch.float8_e4m3fn)),
        r"up_proj\.weight is F8_E4M3 \[112, 64\], expected I8 \[N, K\] for scheme 'int8-static'",
    ),
    "float weight beside a scale": (
        "static",
        assign(weight=torch.ones(112, 64)),
        "up_proj is quantized, but its weight is F32 beside",
    ),
    "float weight alone": (
        "dynamic",
        lambda tensors: (assign(weight=torch.ones(112, 64))(tensors), remove("weight_scale")(tensors)),
        "config.json says .*up_proj is quantized, but its weight is F32 without a scale",
    ),
    "weight of the wrong shape": (
        "dynamic",
        assign(weight=torch.ones(112, 32, dtype=torch.int8)),
        r"up_proj\.weight is \[112, 32\], but config\.json makes it \[112, 64\]",
    ),
    "bias of the wrong shape": (
        "dynamic",
        assign(bias=torch.ones(3)),
        r"up_proj\.bias is F32 \[3\], expected a float \[112\]",
    ),
    "bias missing": (
        "dynamic",
        lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.bias"),
        "q_proj.bias is missing, but config.json makes the layer have one",
    ),
    "norm missing": ("dynamic", lambda tensors: tensors.pop("model.norm.weight"), r"lacks 1 tensor .*: model\.norm\.w"),
    "norm of the wrong shape": (
        "dynamic",
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}),
        r"model\.norm\.weight is \[32\], but config\.json makes it \[64\]",
    ),
    "a layer too many": (
        "dynamic",
        lambda tensors: tensors.update(
            {
                name.replace("layers.0", "layers.7"): value.clone()
                for name, value in tensors.items()
                if "layers.0" in name
            }
        ),
        r"holds 19 tensors that Qwen2ForCausalLM has no place for: model\.layers\.7\..*--drop 'model\.layers\.7\.\*'",
    ),
    "LMDeploy, scale missing": ("lmdeploy", remove("scale"), "up_proj.weight is I8 but .*up_proj.scale is missing"),
    "LMDeploy, weight missing": (
        "lmdeploy",
        remove("weight"),
        "up_proj.scale is stored but .*up_proj.weight is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensors(damage: str, copies: Callable[[str], Path]) -> None:
    source, change, message = DAMAGED_TENSORS[damage]
    directory = copies(source)
    change_tensors(directory, change)
    with pytest.raises(SmoothQuantError, match=message) as caught:
        loading.load(directory)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def set_quantization(key: str, value: object) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"].update({key: value})


DAMAGED_CONFIGS = {
    "not quantized": (lambda config: config.pop("quantization_config"), "is not quantized; run it through"),
    "another method": (
        set_quantization("quant_method", "gptq"),
        "with GPTQ: weights only, .*, which is not W8A8",
    ),
    "ignored layer": (
        set_quantization("ignore", ["lm_head", UP]),
        "up_proj is quantized but config.json says it is not",
    ),
    "head not ignored": (set_quantization("ignore", []), "says lm_head is quantized, but its weight is F32"),
    "static by mistake": (
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(
            strategy="tensor", dynamic=False
        ),
        "activations are static but .*input_scale is missing",
    ),
    "unknown architecture": (
        lambda config: config.update(model_type="qwen99"),
        "model_type 'qwen99', which transformers .* does not have",
    ),
    "of two types": (
        lambda config: config.update(model_type="vit"),
        "model_type 'vit', but architectures Qwen2ForCausalLM, which is of another type",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_CONFIGS)
def test_damaged_configs(damage: str, copies: Callable[[str], Path]) -> None:
    change, message = DAMAGED_CONFIGS[damage]
    directory = copies("dynamic")
    change_config(directory, change)
    with pytest.raises(SmoothQuantError, match=message) as caught:
        loading.load(directory)
    assert "\n" not in str(caught.value)


def test_damaged_files(copies: Callable[[str], Path], tmp_path: Path) -> None:
    def refuses(directory: Path, message: str) -> None:
        with pytest.raises(SmoothQuantError, match=message) as caught:
            loading.load(directory)
        assert "\n" not in str(caught.value)

    refuses(tmp_path / "nowhere", "nowhere is not a directory; name the directory of a saved model")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(empty, r"empty/config\.json does not exist")

    directory = copies("dynamic")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 4, 0):
        weights.write_bytes(content[:length])
        refuses(directory, r"model\.safetensors is truncated or not a safetensors file \(.*\); copy or download")
    weights.write_bytes(content + b"more")
    refuses(directory, r"model\.safetensors is truncated or not")
    weights.unlink()
    refuses(directory, r"dynamic has neither, expected model\.safetensors or model\.safetensors\.index\.json")
    (directory / "pytorch_model.bin").touch()
    refuses(directory, r"has only the pickled pytorch_model\.bin")

    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, expected a JSON object"),
        ("\xff", "JSON"),
    ):
        (directory / "config.json").write_text(text, encoding="latin-1")
        refuses(directory, rf"config\.json {message}" if text != "\xff" else message)


def test_damaged_shards(copies: Callable[[str], Path]) -> None:
    directory = copies("shards")
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = directory / index["weight_map"]["model.norm.weight"]

    renamed = shard.rename(shard.with_suffix(".gone"))
    with pytest.raises(
        SmoothQuantError, match=rf"{shard.name} is missing, though model\.safetensors\.index\.json names it"
    ):
        loading.load(directory)
    renamed.rename(shard)

    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=rf"{shard.name} lacks the tensor model\.norm\.weight"):
        loading.load(directory)

    index_file.write_text("{}")
    with pytest.raises(SmoothQuantError, match=r"index\.json has no weight_map"):
        loading.load(directory)


def test_only_floats_though_quantized(copies: Callable[[str], Path]) -> None:
    directory = copies("dynamic")
    change_tensors(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if "_proj." in name])
    with pytest.raises(SmoothQuantError, match="says it is quantized but holds no 8-bit weight"):
        loading.load(directory)


def test_what_other_tools_store(copies: Callable[[str], Path]) -> None:
    """Scales of any float dtype and rank, superfluous zero points: the same model as ours, with the scales in fp32."""
    model = quantized("qwen2", "int8-static")
    for layer in layers_of(model).values():  # so that no rounding hides a difference
        layer.weight_scale = layer.weight_scale.bfloat16().float()
        layer.input_scale = layer.input_scale.half().float()

    def foreign(tensors: dict[str, Tensor]) -> None:
        for name, layer in layers_of(model).items():
            tensors[f"{name}.weight_scale"] = layer.weight_scale.bfloat16()
            tensors[f"{name}.input_scale"] = layer.input_scale.half().reshape(())
            tensors[f"{name}.weight_zero_point"] = torch.zeros(layer.out_features, 1, dtype=torch.int8)

    directory = copies("static")
    change_tensors(directory, foreign)
    assert_same_model(loading.load(directory), model)


def test_lmdeploy_scales_without_a_second_dimension(copies: Callable[[str], Path]) -> None:
    directory = copies("lmdeploy")
    change_tensors(
        directory, lambda tensors: tensors.update({k: v.flatten() for k, v in tensors.items() if ".scale" in k})
    )
    change_config(directory, lambda config: config.update(quantization_config={"quant_method": "smooth_quant"}))
    assert_same_model(loading.load(directory), quantized("qwen2", "int8"))


def test_a_weight_scale_per_tensor_with_dynamic_activations(copies: Callable[[str], Path], tmp_path: Path) -> None:
    """A combination only other tools write; it runs, and is saved again, in both formats."""
    directory = copies("dynamic")
    model = quantized("qwen2", "int8")
    for layer in layers_of(model).values():
        layer.weight_scale = torch.full_like(layer.weight_scale, 0.003)
    change_tensors(
        directory,
        lambda tensors: tensors.update({k: torch.tensor([0.003]) for k in tensors if k.endswith(".weight_scale")}),
    )
    weights = {"strategy": "tensor", "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    change_config(
        directory, lambda config: config["quantization_config"]["config_groups"]["group_0"].update(weights=weights)
    )
    loaded = loading.load(directory)
    assert torch.equal(logits(loaded), logits(model))
    saving.save(loaded, tmp_path / "again")
    assert_same_model(loading.load(tmp_path / "again"), loaded)
    saving.save(loaded, tmp_path / "again", format="lmdeploy")
    assert torch.equal(logits(loading.load(tmp_path / "again")), logits(model))


def test_a_configuration_without_a_dtype(copies: Callable[[str], Path]) -> None:
    directory = copies("dynamic")
    change_config(directory, lambda config: config.pop("dtype"))
    floats = (torch.float32, torch.bfloat16)
    for dtype in floats:
        change_tensors(
            directory,
            lambda tensors, dtype=dtype: tensors.update(
                {k: v.to(dtype) for k, v in tensors.items() if v.dtype in floats and not k.endswith("scale")}
            ),
        )
        loaded = loading.load(directory)
        assert loaded.dtype == loaded.config.dtype == loaded.model.embed_tokens.weight.dtype == dtype
        assert {layer.weight_scale.dtype for layer in layers_of(loaded).values()} == {torch.float32}
    assert loading.load(directory, dtype=torch.float16).dtype == torch.float16


def test_superfluous_tensors_need_permission(copies: Callable[[str], Path]) -> None:
    directory = copies("dynamic")
    expected = loading.load(directory)
    change_tensors(directory, lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(2)}))
    with pytest.raises(
        SmoothQuantError, match=r"no place for: model\.layers\.9\.extra; .*drop=\['model\.layers\.9\.\*'\]"
    ):
        loading.load(directory)
    assert_same_model(loading.load(directory, drop=["model.layers.9.*"]), expected)


def test_headers_describe_the_layers(pristine: dict[str, Path]) -> None:
    stored = read_checkpoint(pristine["static"])
    layer = stored.layers["model.layers.0.self_attn.k_proj"]
    assert (layer.out_features, layer.in_features, layer.bias) == (32, 64, True)
    assert (layer.weight_scale_shape, layer.input_scale_shape) == ((32, 1), (1,))
    assert len(stored.layers) == 14


@pytest.mark.parametrize("activation", ["token", "tensor"])
@pytest.mark.parametrize("kind", ["int", "float"])
def test_what_compressed_tensors_itself_writes(kind: str, activation: str, tmp_path: Path) -> None:
    """The library quantizes, runs and stores a model on its own; ours loads the result and computes the same."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    per_tensor = (kind, activation) == ("float", "tensor")
    weights = ct.QuantizationArgs(num_bits=8, type=kind, strategy="tensor" if per_tensor else "channel")
    inputs = ct.QuantizationArgs(num_bits=8, type=kind, strategy=activation, dynamic=activation == "token")
    scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    model = tiny.build("llama")
    float_logits = logits(model)
    ct.apply_quantization_config(
        model,
        ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["re:.*lm_head"], format=f"{kind}-quantized"),
    )
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            dims = (0, 1) if per_tensor else (1,)
            low, high = (edge(module.weight.detach(), dims, True) for edge in (torch.amin, torch.amax))
            scale, _ = calculate_qparams(low, high, weights)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if activation == "tensor":
                module.input_scale.data.fill_(0.05)
            module.quantization_status = ct.QuantizationStatus.FROZEN
    theirs = logits(model)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "model")
    compressor.update_config(tmp_path / "model")

    loaded = loading.load(tmp_path / "model")
    assert len(layers_of(loaded)) == 14
    difference, rounding = (logits(loaded) - theirs).norm(), (theirs - float_logits).norm()
    if (kind, activation) == ("int", "token"):
        # Its dynamic INT8 grid has 127.5 steps to our 127: the errors are different ones, but as large.
        assert difference < 2 * rounding
    else:
        # The same grid: only codes that flip where two fp32 sums differ in their last bit.
        assert difference < 0.1 * rounding
