"""Saving and loading: round trips to the bit, what is on the disk, and what other tools make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_w8a8 import COMPRESSED, DYNAMIC, IDS, assert_same_model, config_of, layers_of, logits, quantized
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.probing.linears import find_linears
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe

MODELS = ("llama", "gpt2")  # nn.Linear without biases, and Conv1D with them


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_architecture_comes_back_to_the_bit(model_type: str, tmp_path: Path) -> None:
    model = quantized(model_type)
    saving.save(model, tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert list(layers_of(loaded)) == list(layers_of(model))
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.skipif("lara_mini" not in CONFIG_MAPPING, reason="this transformers has no model that stores such tensors")
def test_floats_that_are_stored_in_one_tensor_with_8_bit_weights_come_back(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
    sizes = tiny.SIZES | tiny.LLAMA_LIKE | experts | heads | {"linear_value_head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["lara_mini"](**sizes)).eval()
    quantize(model, IDS, progress=False)
    parts = [module for name, module in model.named_modules() if ".in_proj_" in name]  # stored as one tensor, in_proj
    assert {isinstance(part, W8A8Linear) for part in parts} == {True, False}
    saving.save(model, tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("scheme", COMPRESSED)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_scheme_in_compressed_tensors(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(model_type, scheme)
    saving.save(model, tmp_path / "model")
    assert config_of(tmp_path / "model")["quantization_config"]["quant_method"] == "compressed-tensors"
    loaded = loading.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert {layer.scheme.name for layer in layers_of(loaded).values()} == {scheme}


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_scheme_in_lmdeploy(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(model_type, scheme)
    saving.save(model, tmp_path / "model", format="lmdeploy")
    assert config_of(tmp_path / "model")["quantization_config"]["quant_method"] == "smooth_quant"
    assert_same_model(loading.load(tmp_path / "model"), model)


def test_layers_of_different_schemes(tmp_path: Path) -> None:
    names = [name for name in find_linears(tiny.build("llama")) if name != "lm_head"]
    model = quantized("llama", "int8", names[:5])
    for name in names[5:9]:
        model.set_submodule(name, quantized("llama", "fp8-static", [name]).get_submodule(name))
    saving.save(model, tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert [layer.scheme.name for layer in layers_of(loaded).values()] == ["int8"] * 5 + ["fp8-static"] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(tied: bool, tmp_path: Path) -> None:
    model = quantized("llama", tie_word_embeddings=tied)
    saving.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert "model.embed_tokens.weight" in stored
    loaded = loading.load(tmp_path / "model")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_same_model(loaded, model)


def test_a_quantized_output_embedding_is_no_longer_tied(tmp_path: Path) -> None:
    model = quantized("llama", names=["lm_head"], tie_word_embeddings=True)
    saving.save(model, tmp_path / "model")
    loaded = loading.load(tmp_path / "model")
    assert isinstance(loaded.lm_head, W8A8Linear)
    assert_same_model(loaded, model)


def test_the_tensors_on_the_disk(tmp_path: Path) -> None:
    model = quantized("qwen2", "int8-static")
    saving.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    layer = layers_of(model)[name]
    tensors = {key.removeprefix(name + "."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
    assert tensors == {
        "weight": (torch.int8, (32, 64)),
        "weight_scale": (torch.float32, (32, 1)),
        "input_scale": (torch.float32, (1,)),
        "bias": (torch.float32, (32,)),
    }
    assert torch.equal(stored[name + ".weight"], layer.plain_weight())
    assert config_of(tmp_path / "model")["quantization_config"]["ignore"] == ["lm_head"]

    model = quantized("qwen2", "fp8-e5m2")
    saving.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    tensors = {key.removeprefix(name + "."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
    assert tensors == {
        "weight": (torch.float8_e5m2, (32, 64)),
        "scale": (torch.float32, (32, 1)),
        "bias": (torch.float32, (32,)),
    }
    assert config_of(tmp_path / "model")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_names_are_those_of_the_hub(tmp_path: Path) -> None:
    # transformers calls GPT-NeoX's output embedding lm_head and fuses Mixtral's experts; checkpoints and vLLM do not.
    saving.save(quantized("gpt_neox"), tmp_path / "neox")
    assert "embed_out.weight" in load_file(tmp_path / "neox" / "model.safetensors")
    assert config_of(tmp_path / "neox")["quantization_config"]["ignore"][0] == "embed_out"

    saving.save(quantized("mixtral"), tmp_path / "mixtral")
    ignore = config_of(tmp_path / "mixtral")["quantization_config"]["ignore"]
    moe = "model.layers.1.block_sparse_moe"
    assert {f"{moe}.gate", *(f"{moe}.experts.{expert}.w{part}" for expert in range(4) for part in (1, 2, 3))} <= set(
        ignore
    )
    assert len(ignore) == len(set(ignore)) == 1 + 2 * (1 + 4 * 3)


def test_shards(tmp_path: Path) -> None:
    model = quantized("llama")
    saving.save(model, tmp_path / "model", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "model" / file).values()) for file in files}
    assert max(sizes.values()) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert_same_model(loading.load(tmp_path / "model"), model)
    with pytest.raises(SmoothQuantError, match="max_shard_size 'large' is not a size like '5GB'"):
        saving.save(model, tmp_path / "other", max_shard_size="large")


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    for scheme in ("int8-static", "fp8-static", "fp8-e5m2"):
        saving.save(quantized("qwen2", scheme), tmp_path / "first")
        loaded = loading.load(tmp_path / "first")
        saving.save(loaded, tmp_path / "second")
        for name in ("model.safetensors", "generation_config.json", "config.json"):
            assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
        shutil.rmtree(tmp_path / "first")


def test_save_pretrained_of_a_loaded_model(tmp_path: Path) -> None:
    model = quantized("llama", "int8-static")
    saving.save(model, tmp_path / "first")
    loading.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_model(loading.load(tmp_path / "second"), model)


def test_dtype_of_the_rest(tmp_path: Path) -> None:
    model = quantized("qwen2", "int8-static")
    saving.save(model, tmp_path / "model")
    loaded = loading.load(tmp_path / "model", dtype=torch.bfloat16)
    layer = loaded.model.layers[0].self_attn.q_proj
    dtypes = (layer.weight.dtype, layer.weight_scale.dtype, layer.input_scale.dtype, layer.bias.dtype)
    assert dtypes == (torch.int8, torch.float32, torch.float32, torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == loaded.dtype == torch.bfloat16
    for module in model.modules():  # not model.to: it would round the rotary frequencies as well
        if isinstance(module, W8A8Linear | nn.Embedding | nn.Linear) or hasattr(module, "variance_epsilon"):
            module.to(torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    saving.save(loaded, tmp_path / "half")
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    assert loading.load(tmp_path / "half").dtype == torch.bfloat16


def test_device_is_honoured(tmp_path: Path, device: str) -> None:
    saving.save(quantized("llama"), tmp_path / "model")
    loaded = loading.load(tmp_path / "model", device=device)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {torch.device(device).type}


def test_generation_and_tokenizer_settings_come_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")),
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    model = quantized("llama")
    model.generation_config.temperature = 0.7  # without sampling: save_pretrained refuses it, published models have it
    model.generation_config.max_new_tokens = 5
    saving.save(model, tmp_path / "model", tokenizer)
    loaded = loading.load(tmp_path / "model")
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generate(IDS[:1]).shape[1] == IDS.shape[1] + 5
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("model_type", ["gpt2", "olmo2"])
def test_explicit_smoothing_survives_and_nobody_else_may_load_it(tmp_path: Path, model_type: str) -> None:
    """Without its scale the model would talk nonsense: transformers itself has to stop."""
    batches = [tiny.token_ids(seed=seed) for seed in range(2)]
    model = quantize(tiny.build(model_type), batches, Recipe(explicit=True), progress=False)
    scaled = {name for name, layer in layers_of(model).items() if layer.smooth is not None}
    assert scaled
    saving.save(model, tmp_path / "w8a8")
    stored = load_file(tmp_path / "w8a8" / "model.safetensors")
    assert {name.removesuffix(".smooth") for name in stored if name.endswith(".smooth")} == scaled
    assert_same_model(loading.load(tmp_path / "w8a8"), model)
    with pytest.raises(ValueError, match="quantization_status"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8")
    for fmt in ("compressed-tensors", "lmdeploy"):
        with pytest.raises(SmoothQuantError, match="explicit smoothing"):
            saving.save(model, tmp_path / "other", format=fmt)


def test_static_and_dynamic_layers_in_one_model_survive(tmp_path: Path) -> None:
    model = quantized(scheme="int8-static")
    for name, layer in layers_of(model).items():
        if name.endswith("down_proj"):
            layer.input_scale, layer.scheme = None, layer.scheme.per_token
    saving.save(model, tmp_path / "w8a8")
    loaded = loading.load(tmp_path / "w8a8")
    assert {layer.scheme.name for layer in layers_of(loaded).values()} == {"int8", "int8-static"}
    assert torch.equal(logits(loaded), logits(model))
