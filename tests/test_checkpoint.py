"""Saving and loading: round trips to the bit, what is on the disk, and what other tools make of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from smoothquant_ext import checkpoint
from smoothquant_ext.convert import convert_
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.fuse import fuse_
from smoothquant_ext.linears import find_linears
from smoothquant_ext.modules import W8A8Linear
from smoothquant_ext.quantize import quantize
from smoothquant_ext.scheme import SCHEMES, Recipe

IDS = tiny.token_ids()
COMPRESSED = [scheme.name for scheme in SCHEMES.values() if scheme.dtype != torch.float8_e5m2]
DYNAMIC = [scheme.name for scheme in SCHEMES.values() if not scheme.is_static]


def quantized(
    model_type: str = "llama", scheme: str = "int8", names: Iterable[str] | None = None, **overrides: object
) -> PreTrainedModel:
    """A tiny model whose linear layers, besides the output embedding, are quantized without smoothing."""
    model = tiny.build(model_type, **overrides)
    linears = find_linears(model)
    head = model.get_output_embeddings()
    names = [name for name, linear in linears.items() if linear is not head] if names is None else list(names)
    absmax: dict[str, Tensor] = {}

    def measure(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor]) -> None:
            absmax[name] = arguments[0].detach().abs().flatten(0, -2).amax(0).float()

        return hook

    handles = [linears[name].register_forward_pre_hook(measure(name)) for name in names]
    logits(model)
    for handle in handles:
        handle.remove()
    for name in names:  # an expert's router may have sent it nothing
        absmax.setdefault(name, torch.ones(1))
    convert_(model, names, absmax, SCHEMES[scheme])
    fuse_(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
    )


def assert_same_model(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    expected, state = model.state_dict(), loaded.state_dict()
    assert list(state) == list(expected)
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []
    assert torch.equal(logits(loaded), logits(model))


def layers_of(model: nn.Module) -> dict[str, W8A8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, W8A8Linear)}


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("model_type", sorted(tiny.CONFIGS))
def test_every_architecture_comes_back_to_the_bit(model_type: str, tmp_path: Path) -> None:
    model = quantized(model_type)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert list(layers_of(loaded)) == list(layers_of(model))
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("scheme", COMPRESSED)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt", "gpt2"])
def test_every_scheme_in_compressed_tensors(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(model_type, scheme)
    checkpoint.save(model, tmp_path / "model")
    assert config_of(tmp_path / "model")["quantization_config"]["quant_method"] == "compressed-tensors"
    loaded = checkpoint.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert {layer.scheme.name for layer in layers_of(loaded).values()} == {scheme}


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt", "gpt2"])
def test_every_scheme_in_lmdeploy(model_type: str, scheme: str, tmp_path: Path) -> None:
    model = quantized(model_type, scheme)
    checkpoint.save(model, tmp_path / "model", format="lmdeploy")
    assert config_of(tmp_path / "model")["quantization_config"]["quant_method"] == "smooth_quant"
    assert_same_model(checkpoint.load(tmp_path / "model"), model)


def test_layers_of_different_schemes(tmp_path: Path) -> None:
    names = [name for name in find_linears(tiny.build("llama")) if name != "lm_head"]
    model = quantized("llama", "int8", names[:5])
    for name in names[5:9]:
        model.set_submodule(name, quantized("llama", "fp8-static", [name]).get_submodule(name))
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert_same_model(loaded, model)
    assert [layer.scheme.name for layer in layers_of(loaded).values()] == ["int8"] * 5 + ["fp8-static"] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(tied: bool, tmp_path: Path) -> None:
    model = quantized("llama", tie_word_embeddings=tied)
    checkpoint.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    assert "model.embed_tokens.weight" in stored
    loaded = checkpoint.load(tmp_path / "model")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert_same_model(loaded, model)


def test_a_quantized_output_embedding_is_no_longer_tied(tmp_path: Path) -> None:
    model = quantized("llama", names=["lm_head"], tie_word_embeddings=True)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert isinstance(loaded.lm_head, W8A8Linear)
    assert_same_model(loaded, model)


def test_the_tensors_on_the_disk(tmp_path: Path) -> None:
    model = quantized("qwen2", "int8-static")
    checkpoint.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    layer = layers_of(model)[name]
    found = {key.removeprefix(name + "."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
    assert found == {
        "weight": (torch.int8, (32, 64)),
        "weight_scale": (torch.float32, (32, 1)),
        "input_scale": (torch.float32, (1,)),
        "bias": (torch.float32, (32,)),
    }
    assert torch.equal(stored[name + ".weight"], layer.plain_weight())
    assert config_of(tmp_path / "model")["quantization_config"]["ignore"] == ["lm_head"]

    model = quantized("qwen2", "fp8-e5m2")
    checkpoint.save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    found = {key.removeprefix(name + "."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
    assert found == {
        "weight": (torch.float8_e5m2, (32, 64)),
        "scale": (torch.float32, (32, 1)),
        "bias": (torch.float32, (32,)),
    }
    assert config_of(tmp_path / "model")["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


def test_names_are_those_of_the_hub(tmp_path: Path) -> None:
    # transformers calls GPT-NeoX's output embedding lm_head and fuses Mixtral's experts; checkpoints and vLLM do not.
    checkpoint.save(quantized("gpt_neox"), tmp_path / "neox")
    assert "embed_out.weight" in load_file(tmp_path / "neox" / "model.safetensors")
    assert config_of(tmp_path / "neox")["quantization_config"]["ignore"][0] == "embed_out"

    checkpoint.save(quantized("mixtral"), tmp_path / "mixtral")
    ignore = config_of(tmp_path / "mixtral")["quantization_config"]["ignore"]
    moe = "model.layers.1.block_sparse_moe"
    assert {f"{moe}.gate", *(f"{moe}.experts.{expert}.w{part}" for expert in range(4) for part in (1, 2, 3))} <= set(
        ignore
    )
    assert len(ignore) == len(set(ignore)) == 1 + 2 * (1 + 4 * 3)


def test_shards(tmp_path: Path) -> None:
    model = quantized("llama")
    checkpoint.save(model, tmp_path / "model", max_shard_size="30KB")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "model" / file).values()) for file in files}
    assert max(sizes.values()) <= 30_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert_same_model(checkpoint.load(tmp_path / "model"), model)
    with pytest.raises(SmoothQuantError, match="max_shard_size 'large' is not a size like '5GB'"):
        checkpoint.save(model, tmp_path / "other", max_shard_size="large")


def test_saving_again_changes_nothing(tmp_path: Path) -> None:
    for scheme in ("int8-static", "fp8-static", "fp8-e5m2"):
        checkpoint.save(quantized("qwen2", scheme), tmp_path / "first")
        loaded = checkpoint.load(tmp_path / "first")
        checkpoint.save(loaded, tmp_path / "second")
        for name in ("model.safetensors", "generation_config.json", "config.json"):
            assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
        shutil.rmtree(tmp_path / "first")


def test_save_pretrained_of_a_loaded_model(tmp_path: Path) -> None:
    model = quantized("llama", "int8-static")
    checkpoint.save(model, tmp_path / "first")
    checkpoint.load(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert_same_model(checkpoint.load(tmp_path / "second"), model)


def test_saving_over_the_directory_that_was_loaded(tmp_path: Path) -> None:
    checkpoint.save(quantized("llama"), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    expected = logits(loaded)
    checkpoint.save(loaded, tmp_path / "model", format="lmdeploy")
    assert torch.equal(logits(loaded), expected)  # its floats may still be mapped from the file that is gone
    assert torch.equal(logits(checkpoint.load(tmp_path / "model")), expected)


def test_dtype_of_the_rest(tmp_path: Path) -> None:
    model = quantized("qwen2", "int8-static")
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", dtype=torch.bfloat16)
    layer = loaded.model.layers[0].self_attn.q_proj
    dtypes = (layer.weight.dtype, layer.weight_scale.dtype, layer.input_scale.dtype, layer.bias.dtype)
    assert dtypes == (torch.int8, torch.float32, torch.float32, torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == loaded.dtype == torch.bfloat16
    for module in model.modules():  # not model.to: it would round the rotary frequencies as well
        if isinstance(module, W8A8Linear | nn.Embedding | nn.Linear) or hasattr(module, "variance_epsilon"):
            module.to(torch.bfloat16)
    assert torch.equal(logits(loaded), logits(model))
    checkpoint.save(loaded, tmp_path / "half")
    assert config_of(tmp_path / "half")["dtype"] == "bfloat16"
    assert checkpoint.load(tmp_path / "half").dtype == torch.bfloat16


def test_device_is_honoured(tmp_path: Path, device: str) -> None:
    checkpoint.save(quantized("llama"), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", device=device)
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
    checkpoint.save(model, tmp_path / "model", tokenizer)
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.generation_config.temperature == 0.7
    assert loaded.generate(IDS[:1]).shape[1] == IDS.shape[1] + 5
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match="LlamaForCausalLM has no quantized layer; call quantize"):
        checkpoint.save(tiny.build("llama"), tmp_path / "model")
    model = quantized("llama")
    model.model.layers[1].mlp.up_proj.weight_scale[3] = float("nan")
    with pytest.raises(
        SmoothQuantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale is not positive and finite"
    ):
        checkpoint.save(model, tmp_path / "model")
    model = quantized("llama")
    model.model.norm.to("meta")
    with pytest.raises(SmoothQuantError, match=r"model\.norm\.weight is offloaded"):
        checkpoint.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_destinations(tmp_path: Path) -> None:
    target = tmp_path / "model"
    assert checkpoint.check_destination(target) == target
    assert checkpoint.check_destination(tmp_path / "new" / "model") == tmp_path / "new" / "model"
    target.mkdir()
    checkpoint.check_destination(target)
    checkpoint.save(quantized("llama", "int8"), target)
    checkpoint.check_destination(target)
    model = quantized("llama", "fp8")
    checkpoint.save(model, target)
    assert_same_model(checkpoint.load(target), model)

    link = tmp_path / "link"
    link.symlink_to(target)
    checkpoint.save(quantized("llama", "int8"), link)
    assert link.is_symlink()
    assert config_of(target)["quantization_config"]["format"] == "int-quantized"

    (target / "notes.md").write_text("mine")
    with pytest.raises(SmoothQuantError, match=r"model already holds notes\.md; choose an empty or a new directory"):
        checkpoint.save(model, target)
    (target / "notes.md").unlink()
    (target / "below").mkdir()
    with pytest.raises(SmoothQuantError, match="already holds below"):
        checkpoint.check_destination(target)
    with pytest.raises(SmoothQuantError, match=r"config\.json is a file; name a directory"):
        checkpoint.check_destination(target / "config.json")


def test_a_directory_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *arguments: False)  # root may read and write anywhere
    with pytest.raises(SmoothQuantError, match="is not readable and writable"):
        checkpoint.check_destination(tmp_path)


def test_a_float_model_is_not_replaced(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(SmoothQuantError, match="already holds something that is not a W8A8 checkpoint"):
        checkpoint.check_destination(tmp_path / "float")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "results.json").write_text("{}")
    with pytest.raises(SmoothQuantError, match=r"data already holds results\.json"):
        checkpoint.check_destination(tmp_path / "data")
    (tmp_path / "data" / "results.json").rename(tmp_path / "data" / "config.json")
    with pytest.raises(SmoothQuantError, match="already holds something that is not a W8A8 checkpoint"):
        checkpoint.check_destination(tmp_path / "data")


SAVE_AND_DIE = """
import os, sys
from smoothquant_ext import checkpoint
source, target, place = sys.argv[1:]
model = checkpoint.load(source)
if place == "weights":
    write, calls = checkpoint.save_file, []
    def save_file(*arguments, **kwargs):
        calls.append(write(*arguments, **kwargs))
        if len(calls) == 3:
            os._exit(9)
    checkpoint.save_file = save_file
elif place == "configs":
    write_configs = checkpoint._write_configs
    def die(*arguments):
        write_configs(*arguments)
        os._exit(9)
    checkpoint._write_configs = die
elif place == "full disk":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
checkpoint.save(model, target, format="lmdeploy", max_shard_size="20KB")
"""


def save_and_die(source: Path, target: Path, place: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", SAVE_AND_DIE, str(source), str(target), place]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("place", ["weights", "configs"])
def test_a_killed_save_leaves_the_old_checkpoint(place: str, tmp_path: Path) -> None:
    model = quantized("llama")
    target = tmp_path / "model"
    checkpoint.save(model, target)
    assert save_and_die(target, target, place).returncode == 9
    assert_same_model(checkpoint.load(target), model)
    litter = [path.name for path in tmp_path.iterdir() if path != target]
    assert len(litter) == 1
    assert litter[0].startswith(".model.saving-")
    checkpoint.save(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    checkpoint.save(quantized("llama"), tmp_path / "source")
    finished = save_and_die(tmp_path / "source", tmp_path / "model", "full disk")
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("smoothquant_ext.errors.SmoothQuantError: ")
    assert "model could not be written" in last
    assert "File too large" in last
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model_type", ["gpt2", "olmo2"])
def test_explicit_smoothing_survives_and_nobody_else_may_load_it(tmp_path, model_type):
    """Without its scale the model would talk nonsense: transformers itself has to stop."""
    batches = [tiny.token_ids(seed=seed) for seed in range(2)]
    model = quantize(tiny.build(model_type), batches, Recipe(explicit=True), progress=False)
    scaled = {name for name, layer in layers_of(model).items() if layer.smooth is not None}
    assert scaled
    checkpoint.save(model, tmp_path / "w8a8")
    stored = load_file(tmp_path / "w8a8" / "model.safetensors")
    assert {name.removesuffix(".smooth") for name in stored if name.endswith(".smooth")} == scaled
    assert_same_model(checkpoint.load(tmp_path / "w8a8"), model)
    with pytest.raises(ValueError, match="quantization_status"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "w8a8")
    for fmt in ("compressed-tensors", "lmdeploy"):
        with pytest.raises(SmoothQuantError, match="explicit smoothing"):
            checkpoint.save(model, tmp_path / "other", format=fmt)


def test_static_and_dynamic_layers_in_one_model_survive(tmp_path):
    model = quantized(scheme="int8-static")
    for name, layer in layers_of(model).items():
        if name.endswith("down_proj"):
            layer.input_scale, layer.scheme = None, layer.scheme.per_token
    checkpoint.save(model, tmp_path / "w8a8")
    loaded = checkpoint.load(tmp_path / "w8a8")
    assert {layer.scheme.name for layer in layers_of(loaded).values()} == {"int8", "int8-static"}
    assert torch.equal(logits(loaded), logits(model))
