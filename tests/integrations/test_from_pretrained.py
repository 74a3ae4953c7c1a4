"""transformers' own entry points after ``enable()``: what they load, and what works on it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import pytest
import tiny
import torch
from tiny_w8a8 import logits, quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import smoothquant_ext
from smoothquant_ext.checkpoint import loading, saving
from smoothquant_ext.checkpoint.naming import quantized_layers
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.fusion.decoder_layer import FusedDecoderLayer

IDS = tiny.token_ids()


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    smoothquant_ext.enable()
    yield
    smoothquant_ext.disable()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runtime")
    for name, scheme, fmt in (
        ("int8", "int8", None),
        ("static", "int8-static", None),
        ("lmdeploy", "int8", "lmdeploy"),
        ("e5m2", "fp8-e5m2", None),
        ("shards", "int8", None),
    ):
        model = quantized("llama", scheme)
        saving.save(model, root / name, format=fmt, max_shard_size="30KB" if name == "shards" else "5GB")
    vllm = {"quant_method": "fp8", "activation_scheme": "static"}
    foreign.write_fp8(tiny.build("llama"), root / "fp8", vllm, ("weight_scale", "input_scale"), False)
    return {path.name: path for path in root.iterdir()}


def from_pretrained(directory: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("name", ["int8", "static", "lmdeploy", "e5m2", "shards", "fp8"])
def test_it_is_the_model_that_load_gives(name: str, checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints[name])
    expected = loading.load(checkpoints[name])
    assert torch.equal(logits(model), logits(expected))
    assert {type(module) for module in model.modules()} == {type(module) for module in expected.modules()}
    assert all(layer.is_packed for layer in quantized_layers(model).values())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
def test_device_maps(options: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints["int8"], **options)
    assert torch.equal(logits(model), logits(loading.load(checkpoints["int8"])))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_dtypes(name: str, checkpoints: dict[str, Path]) -> None:
    for dtype in (torch.bfloat16, torch.float32, "auto"):
        model = from_pretrained(checkpoints[name], dtype=dtype)
        expected = loading.load(checkpoints[name], dtype=None if dtype == "auto" else dtype)
        assert model.dtype == expected.dtype
        assert torch.equal(logits(model), logits(expected))
        assert all(layer.weight_scale.dtype == torch.float32 for layer in quantized_layers(model).values())


@pytest.mark.parametrize("name", ["int8", "static", "lmdeploy", "fp8"])
def test_save_pretrained_writes_what_loads_again(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = from_pretrained(checkpoints[name])
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    for again in (from_pretrained(tmp_path / "again"), loading.load(tmp_path / "again")):
        assert torch.equal(logits(again), logits(model))


def test_what_was_quantized_just_now_can_be_saved_by_transformers(tmp_path: Path) -> None:
    from smoothquant_ext import Recipe, quantize

    model = quantize(tiny.build("llama"), [IDS], Recipe("int8"), progress=False)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(from_pretrained(tmp_path / "model")), logits(model))


def test_what_8_bit_layers_cannot_do_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = from_pretrained(checkpoints["e5m2"])
    with pytest.raises(SmoothQuantError, match=r"e5m2 is stored in format 'lmdeploy', .*; use smoothquant_ext\.save"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(SmoothQuantError, match="cannot use gradient checkpointing; train adapters without it"):
        model.gradient_checkpointing_enable()
    config = model.config.from_pretrained(checkpoints["int8"])
    with pytest.raises(SmoothQuantError, match="loaded from files, not from a state dict"):
        type(model).from_pretrained(None, config=config, state_dict=model.state_dict())


def test_models_that_are_not_w8a8_load_as_before(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path / "float")
    assert not quantized_layers(from_pretrained(tmp_path / "float"))
    # Handed on to whoever was there before; and where nobody was, our sentence says what it is.
    entry = AUTO_QUANTIZATION_CONFIG_MAPPING["fp8"]
    blocks = entry.from_dict({"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert type(blocks).__name__ == "FineGrainedFP8Config"
    assert type(entry(activation_scheme="dynamic")).__name__ == "FineGrainedFP8Config"
    with pytest.raises(SmoothQuantError, match="NVFP4"):
        AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"].from_dict({"quant_method": "modelopt", "quant_algo": "NVFP4"})


def test_enable_twice_and_disable() -> None:
    during = dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    smoothquant_ext.enable()
    assert during == AUTO_QUANTIZATION_CONFIG_MAPPING
    smoothquant_ext.disable()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fp8"].__name__ == "FineGrainedFP8Config"
    assert "smooth_quant" not in AUTO_QUANTIZATION_CONFIG_MAPPING
    smoothquant_ext.disable()


def by_hand(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """Greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("name", ["int8", "static", "fp8"])
def test_every_way_to_generate(name: str, checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints[name])
    expected = by_hand(model, IDS, 6)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)
    one = IDS[:1]
    assert torch.equal(
        model.generate(one, assistant_model=from_pretrained(checkpoints["fp8"]), **options), expected[:1]
    )
    assert torch.equal(model.generate(one, prompt_lookup_num_tokens=2, **options), expected[:1])
    beams = model.generate(IDS, num_beams=3, **options)
    assert float(log_likelihood(model, beams)) >= float(log_likelihood(model, expected)) - 1e-3
    torch.manual_seed(0)
    sampled = model.generate(IDS, max_new_tokens=6, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=True), sampled)


def log_likelihood(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the new tokens of the first row."""
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.log_softmax(-1)[0, IDS.shape[1] - 1 : -1]
    return scores.gather(1, ids[0, IDS.shape[1] :, None]).sum()


def test_continuous_batching(checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints["int8"])
    attention = model.config._attn_implementation
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    prompts = [IDS[0].tolist(), IDS[1, :7].tolist()]
    from transformers import ContinuousBatchingConfig

    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    for _ in range(2):  # a second batch finds the model as it was
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        tokens = [output.generated_tokens for output in outputs.values()]
        assert tokens == [by_hand(model, torch.tensor([prompt]), 5)[0, len(prompt) :].tolist() for prompt in prompts]
        assert model.config._attn_implementation == attention


def test_compiled_forward(checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints["int8"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-4)


def test_parts_that_come_and_go_are_not_fused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    expected = logits(from_pretrained(checkpoints["int8"]))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    for buffers in (False, True):
        model = from_pretrained(
            checkpoints["int8"], device_map=places, offload_folder=tmp_path / "offload", offload_buffers=buffers
        )
        packed = {name for name, layer in quantized_layers(model).items() if layer.is_packed}
        assert packed == {name for name in quantized_layers(model) if "layers.0" in name or not buffers}
        assert [isinstance(layer, FusedDecoderLayer) for layer in model.model.layers] == [True, False]
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_pickled_copied_and_loaded_again(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = from_pretrained(checkpoints["int8"])
    expected = logits(model)
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(logits(again), expected)
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = from_pretrained(checkpoints["lmdeploy"])
    for layer in quantized_layers(other).values():
        layer.weight = torch.zeros_like(layer.weight)
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)
    assert all(layer.is_packed for layer in quantized_layers(other).values())


def test_a_batch_that_cannot_begin_leaves_the_attention(checkpoints: dict[str, Path]) -> None:
    model = from_pretrained(checkpoints["int8"])
    attention = model.config._attn_implementation
    with pytest.raises(TypeError):
        model.init_continuous_batching(nonsense=True)
    assert model.config._attn_implementation == attention


def test_a_quantized_head_that_is_tied_is_said(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = quantized("llama", names=["lm_head", "model.layers.0.mlp.up_proj"])
    saving.save(model, tmp_path / "head")
    assert torch.equal(logits(from_pretrained(tmp_path / "head")), logits(model))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(SmoothQuantError, match=r"lm_head is quantized, but config\.json ties it"):
        loading.load(tmp_path / "head")


def test_entries_can_be_copied() -> None:
    assert copy.deepcopy(AUTO_QUANTIZATION_CONFIG_MAPPING)["fp8"].method == "fp8"
