"""Fused models on a GPU: the CPU's results, wherever a model was fused and however it got there."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_w8a8
import torch
from emulated_cuda import unsettled
from emulation import ROOT
from tiny_text import tiny_tokenizer
from tiny_w8a8 import IDS
from torch import Tensor, nn
from torch_attention import torch_attention
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from smoothquant_ext import Int8Cache, Recipe, disable, enable, load, ops, quantize, save
from smoothquant_ext.fusion.decoder_layer import FusedDecoderLayer
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.fusion.mlp import FusedMLP
from smoothquant_ext.fusion.rms_norm import FusedRMSNorm

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
    pytest.mark.usefixtures("gpu", "_attention"),
]
ARCHITECTURES = ("llama", "qwen3", "gemma", "phi3", "gpt_neox", "opt", "mixtral")
FUSED_OPS = ("rms_norm", "w8a8_mlp", "w8a8_linear_group", "w8a8_decoder_layer_")


@pytest.fixture
def _attention() -> Iterator[None]:
    """``ops.attention`` on the device, if nothing is there yet."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("sq::attention", "CUDA"):
        yield
        return
    with torch.library._scoped_library("sq", "IMPL") as library:
        library.impl("attention", torch_attention, "CUDA")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every call of a fused op, as its name and the device of its input."""
    seen: list[tuple[str, str]] = []

    def noted(name: str) -> Any:
        op = getattr(ops, name)
        return lambda x, *rest, **named: seen.append((name, x.device.type)) or op(x, *rest, **named)

    for name in FUSED_OPS:
        monkeypatch.setattr(ops, name, noted(name))
    return seen


def quantized(architecture: str, scheme: str = "int8", dtype: torch.dtype = torch.float32) -> Any:
    if architecture == "mixtral":
        return quantize(tiny.build(architecture, dtype), IDS, Recipe(scheme), progress=False)
    return tiny_w8a8.quantized(architecture, scheme, dtype=dtype)


def unfused(architecture: str = "llama", scheme: str = "int8") -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_w8a8, "fuse_", lambda _model: [])
        return tiny_w8a8.quantized(architecture, scheme)


def logits(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(ids.to(model.get_input_embeddings().weight.device), **kwargs).logits
    return output.cpu()


def eager(model: Any) -> Any:
    """Attention of operators that are the same on every device."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bits_are_the_cpus_there_and_back(architecture: str, calls: list[tuple[str, str]]) -> None:
    model = eager(quantized(architecture))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls.clear()
    expected = logits(model)
    on_cpu = [name for name, _ in calls]
    calls.clear()
    model.to("cuda")
    assert torch.equal(logits(model), expected)
    assert calls == [(name, "cuda") for name in on_cpu]
    calls.clear()
    model.to("cpu")
    assert torch.equal(logits(model), expected)
    assert calls == [(name, "cpu") for name in on_cpu]
    now = model.state_dict()
    assert list(now) == list(state)
    assert [name for name in state if not tiny_w8a8.same_bits(now[name], state[name])] == []


@pytest.mark.parametrize("scheme", ["int8-static", "fp8", "fp8-static"])
def test_other_schemes(scheme: str) -> None:
    model = eager(quantized("llama", scheme))
    expected = logits(model)
    model.to("cuda")
    # FP8 sums are rounded in another order, which moves a value of a later layer by one step of 2^-3 now and then.
    error = (logits(model) - expected).norm() / expected.norm()
    assert float(error) <= (0.0 if scheme.startswith("int8") else 0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generated_tokens_are_the_cpus(architecture: str) -> None:
    model, prompt = quantized(architecture), tiny.token_ids(2, 12)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0  # padding on the left

    def generate(**options: Any) -> Tensor:
        inputs = {"inputs": prompt.to(model.device), "attention_mask": mask.to(model.device)}
        options |= {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
        return model.generate(**inputs, **options).cpu()

    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}]
    ways += [{"num_beams": 2}] if architecture == "llama" else []
    expected = [generate(**way) for way in ways]
    int8 = generate(cache=Int8Cache(model.config))
    model.to("cuda")
    for way, tokens in zip(ways, expected, strict=True):
        assert torch.equal(generate(**way), tokens), way
    assert torch.equal(generate(cache=Int8Cache(model.config)), int8)


def layer_by_layer(model: Any) -> Any:
    """The same model without whole layers."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.__class__ = type(layer).__mro__[2]
    return plain


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("kind", ["growing", "int8", "static"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_is_one_op_with_the_bits_of_its_modules(
    device: str, kind: str, architecture: str, calls: list[tuple[str, str]]
) -> None:
    model = quantized(architecture).to(device)
    plain, ids = layer_by_layer(model), tiny.token_ids(2, 20, seed=8).to(device)
    make: Any = {
        "growing": lambda: DynamicCache(config=model.config),
        "int8": lambda: Int8Cache(model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=24),
    }[kind]
    ours, theirs = make(), make()
    calls.clear()
    for begin, end in ((0, 12), (12, 13), (13, 14), (14, 20)):
        parts = [logits(one, ids[:, begin:end], cache=cache) for one, cache in ((model, ours), (plain, theirs))]
        assert torch.equal(*parts), (begin, end)
    assert calls.count(("w8a8_decoder_layer_", device)) == 4 * len(model.model.layers)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert int(one.get_seq_length()) == int(other.get_seq_length()) == 20


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3", "opt"])
def test_a_model_that_is_there_already_is_fused_there(architecture: str) -> None:
    expected = unfused(architecture)
    names = fuse_(expected)
    model = unfused(architecture).to("cuda")
    assert fuse_(model) == names
    assert torch.equal(logits(eager(model)), logits(eager(expected)))
    assert torch.equal(logits(model.to("cpu")), logits(expected))


def test_without_our_library_torch_computes_the_ops(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    model = unfused()
    names = fuse_(model)
    expected = logits(model)
    with unsettled(tmp_path / "none.so") as state:
        model.to("cuda")
        assert state.settled is not None
        assert "w8a8_decoder_layer_" in state.settled.replaced
        there = unfused().to("cuda")
        assert fuse_(there) == names
        for one in (model, there):
            calls.clear()
            # Norms differ in the last bits of fp32, which moves a value across a rounding boundary of INT8 now and
            # then, by one step: at most 1 / 127 of its row's largest.
            assert float((logits(one) - expected).norm() / expected.norm()) < 1 / 127
            assert calls.count(("w8a8_decoder_layer_", "cuda")) == 2


def test_bits_that_differ_there_are_compared_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may sum in an order that depends on how many columns it multiplies at once."""
    op = ops.w8a8_decoder_layer_
    monkeypatch.setattr(ops, "w8a8_decoder_layer_", lambda x, *rest: op(x, *rest) * (1.0 if x.is_cpu else 1 + 1e-6))
    model = unfused().to("cuda")
    assert {"model.layers.0", "model.layers.1"} <= set(fuse_(model))
    monkeypatch.setattr(ops, "w8a8_decoder_layer_", lambda x, *rest: op(x, *rest) * (1 + 1e-6))
    assert not any(name[-8:] == "layers.0" for name in fuse_(unfused().to("cuda")))


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters(calls: list[tuple[str, str]]) -> None:
    model = eager(quantized("llama"))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.v_proj, mlp.gate_proj = Adapter(attention.v_proj), Adapter(mlp.gate_proj)
    expected = logits(model)
    calls.clear()
    assert torch.equal(logits(model.to("cuda")), expected)
    assert [name for name, _ in calls].count("w8a8_mlp") == 1  # the other layer's
    assert torch.equal(logits(model.to("cpu")), expected)


def test_copies_pickles_and_two_models_at_once() -> None:
    model, other = (eager(quantized(name)) for name in ("llama", "qwen3"))
    expected, others = logits(model), logits(other)
    model.to("cuda")
    twin = copy.deepcopy(model)
    other.to("cuda")
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(other), others)
    assert held(twin) == held(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=False)
    assert held(loaded) == held(model)
    assert torch.equal(logits(loaded.to("cuda")), expected)
    assert torch.equal(logits(twin.to("cpu")), expected)
    assert torch.equal(logits(model), expected)


def held(model: nn.Module) -> int:
    """Bytes that the model's tensors keep alive."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    save(tiny_w8a8.quantized("llama"), tmp_path / "model", tiny_tokenizer())
    enable()
    yield tmp_path / "model"
    disable()


def test_loaded_straight_to_it(directory: Path, calls: list[tuple[str, str]]) -> None:
    pytest.importorskip("accelerate")
    expected = logits(eager(load(directory)))
    ways: list[Any] = [load(directory).to("cuda"), load(directory, "cuda")]
    for model in (AutoModelForCausalLM.from_pretrained(directory, device_map="cuda"), *ways):
        kinds = (FusedRMSNorm, FusedMLP, FusedDecoderLayer)
        assert [sum(isinstance(each, kind) for each in model.modules()) for kind in kinds] == [5, 2, 2]
        calls.clear()
        logits(model)
        assert calls.count(("w8a8_decoder_layer_", "cuda")) == 2
        assert torch.equal(logits(eager(model)), expected)
        save(model, directory.parent / "again")
        assert (directory.parent / "again" / "model.safetensors").read_bytes() == (
            directory / "model.safetensors"
        ).read_bytes()


def test_split_between_a_gpu_and_the_cpu(directory: Path, calls: list[tuple[str, str]]) -> None:
    """Hooks of accelerate bring inputs to a layer's device, and offloaded layers to the GPU for each of their calls."""
    pytest.importorskip("accelerate")
    there = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    places = dict.fromkeys(there, "cuda:0") | dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=places)
    assert [isinstance(layer, FusedDecoderLayer) for layer in model.model.layers] == [True, False]
    calls.clear()
    output = logits(model)
    assert calls.count(("w8a8_decoder_layer_", "cuda")) == 1
    torch.testing.assert_close(output, logits(load(directory)), rtol=1e-4, atol=1e-5)
    tokens = model.generate(IDS[:, :12].to("cuda"), max_new_tokens=6, do_sample=False).cpu()
    assert torch.equal(tokens, load(directory).generate(IDS[:, :12], max_new_tokens=6, do_sample=False))
