"""Whole decoder layers as one op: the bits of the single modules, and the way back to them for whatever is unusual."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from op_cases import ISAS, assert_same_bits, cpu_isa, randn, threads
from tiny import build, token_ids
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from smoothquant_ext import ops, reference
from smoothquant_ext.fusion.decoder_layer import MOST_ROWS, FusedDecoderLayer
from smoothquant_ext.fusion.fuse import fuse_
from smoothquant_ext.nn.int8_kv_cache import Int8Cache
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.quantization.pipeline import quantize
from smoothquant_ext.quantization.recipe import Recipe
from smoothquant_ext.reference.decoder_layer import w8a8_decoder_layer_
from smoothquant_ext.scheme import SCHEMES

FAMILY = ("llama", "mistral", "qwen2", "qwen3")


def quantized(model_type: str = "llama", scheme: str = "int8", dtype: torch.dtype = torch.float32) -> Any:
    # A sliding window keeps keys and values in another way.
    model = build(model_type, **({"sliding_window": None} if model_type == "mistral" else {})).to(dtype)
    return quantize(model, token_ids(), Recipe(scheme), progress=False)


def layer_by_layer(model: Any) -> Any:
    """The same model without whole layers."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.__class__ = type(layer).__mro__[2]  # the class before FusedDecoderLayer was mixed in
        assert not isinstance(layer, FusedDecoderLayer)
    return plain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every call of the op."""
    seen: list[Tensor] = []
    op = ops.w8a8_decoder_layer_
    monkeypatch.setattr(ops, "w8a8_decoder_layer_", lambda x, *rest: seen.append(x) or op(x, *rest))
    return seen


# --- the op ---------------------------------------------------------------------------------------------------------


def operands(
    batch: int, time: int, past: int, dtype: torch.dtype, has_bias: bool, is_static: bool, eight_bit: torch.dtype
) -> dict[str, Any]:
    k, d, heads, kv_heads, inner = 40, 10, 4, 2, 70
    shapes = [(heads * d, k), (kv_heads * d, k), (kv_heads * d, k), (k, heads * d), (inner, k), (inner, k), (k, inner)]
    weights = [reference.quantize_per_token(randn(*shape, seed=i), eight_bit) for i, shape in enumerate(shapes)]
    angles = randn(1 if batch == 1 else batch, time, d, seed=20)
    biases = [randn(shape[0], seed=30 + i) if i % 2 == 0 else torch.empty(0) for i, shape in enumerate(shapes)]
    cache = randn(2, batch, kv_heads, past + time + 5, d, seed=21, dtype=dtype)
    return {
        "x": randn(batch, time, k, dtype=dtype),
        "norm": randn(k, seed=22, dtype=dtype),
        "post_norm": randn(k, seed=23),
        "eps": 1e-5,
        "post_eps": 1e-6,
        "offset": 1.0 if has_bias else 0.0,
        "b": [ops.prepack_weight(weight) for weight, _ in weights],
        "b_scale": [scale for _, scale in weights],
        "bias": biases if has_bias else [],
        "a_scale": [torch.tensor([value]) for value in (0.02, 0.03, 0.04, 0.05)] if is_static else [],
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": cache[0].contiguous(),
        "values": cache[1].contiguous(),
        "past": past,
        "mask": None,
        "scale": 0.3,
        "causal": time > 1,
    }


def with_int8_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with the cache quantized."""
    keys, keys_scale = reference.quantize_per_token(arguments["keys"], torch.int8)
    values, values_scale = reference.quantize_per_token(arguments["values"], torch.int8)
    cache = {"keys": keys, "values": values, "keys_scale": keys_scale, "values_scale": values_scale}
    return arguments | {"activation": "silu"} | cache


def with_head_norms(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with norms of the heads of q and k."""
    defaults = {"activation": "silu", "keys_scale": None, "values_scale": None}
    dtype = arguments["x"].dtype
    norms = {"q_norm": randn(10, seed=24, dtype=dtype), "k_norm": randn(20, seed=25)[::2], "head_eps": 1e-3}
    return arguments | {name: value for name, value in defaults.items() if name not in arguments} | norms


def check_op(arguments: dict[str, Any]) -> None:
    """The bits of the op made of plain torch and our attention, in the result and in the cache."""
    names = [name for name in ("keys", "values", "keys_scale", "values_scale") if arguments.get(name) is not None]
    expected_cache = {name: arguments[name].clone() for name in names}
    expected = w8a8_decoder_layer_(**arguments | expected_cache, attend=ops.attention)
    assert_same_bits(ops.w8a8_decoder_layer_(**arguments), expected)
    for name, values in expected_cache.items():
        assert_same_bits(arguments[name], values)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "time", "past"), [(1, 1, 0), (1, 1, 37), (3, 1, 300), (2, 7, 0), (1, 5, 9), (1, 0, 3)]
)
def test_the_op_equals_the_oracle(batch: int, time: int, past: int, dtype: torch.dtype, isa: str) -> None:
    with cpu_isa(isa):
        for has_bias, is_static in ((False, False), (True, False), (False, True)):
            check_op(operands(batch, time, past, dtype, has_bias, is_static, torch.int8))
            for dynamic in ((3,), (0, 2), (1,)) if is_static else ():
                mixed = operands(batch, time, past, dtype, has_bias, is_static, torch.int8)
                mixed["a_scale"] = [torch.empty(0) if i in dynamic else s for i, s in enumerate(mixed["a_scale"])]
                check_op(mixed)
            check_op(with_int8_cache(operands(batch, time, past, dtype, has_bias, is_static, torch.int8)))
            check_op(with_head_norms(operands(batch, time, past, dtype, has_bias, is_static, torch.int8)))
            cached = with_int8_cache(operands(batch, time, past, dtype, has_bias, is_static, torch.int8))
            check_op(with_head_norms(cached))


@pytest.mark.parametrize("isa", ISAS)
def test_the_op_with_a_mask_and_with_weights_that_are_not_packed(isa: str) -> None:
    with cpu_isa(isa):
        arguments = operands(2, 5, 9, torch.float32, False, False, torch.int8)
        arguments["mask"] = torch.rand(2, 1, 5, 14, generator=torch.Generator().manual_seed(0)) > 0.3
        arguments["causal"] = False
        check_op(arguments)
        check_op(with_int8_cache(arguments))
        arguments["b"] = [
            ops.unpack_weight(b, scale.numel(), 70 if i == 6 else 40)
            for i, (b, scale) in enumerate(zip(arguments["b"], arguments["b_scale"], strict=True))
        ]
        check_op(arguments)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    for batch, time in ((1, 1), (4, 40)):
        results = []
        for count in (1, 2, 3, 7):
            with threads(count):
                arguments = operands(batch, time, 300, torch.bfloat16, False, False, torch.int8)
                results.append(ops.w8a8_decoder_layer_(**arguments))
                results.append(ops.w8a8_decoder_layer_(**with_head_norms(with_int8_cache(arguments))))
        assert all(torch.equal(result, results[0]) for result in results[::2])
        assert all(torch.equal(result, results[1]) for result in results[1::2])


def test_keys_and_values_may_have_different_room() -> None:
    arguments = operands(2, 3, 4, torch.float32, False, False, torch.int8)
    expected = ops.w8a8_decoder_layer_(**arguments)
    for own in (arguments, with_int8_cache(arguments)):
        own = own | {name: own[name][:, :, :7].contiguous() for name in ("values", "values_scale") if name in own}
        check_op(own)
        if own["keys"].dtype == torch.float32:
            assert torch.equal(ops.w8a8_decoder_layer_(**own), expected)


def test_a_row_that_is_not_finite_spoils_no_other_sequence() -> None:
    arguments = operands(3, 1, 5, torch.float32, False, False, torch.int8)
    clean = ops.w8a8_decoder_layer_(**arguments)
    arguments["x"][1, 0, 3] = torch.nan
    y = ops.w8a8_decoder_layer_(**arguments)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.ones(2, 40)}, r"x has shape \[2, 40\], expected \[B, T, K\]"),
    ({"x": torch.ones(2, 3, 40).int()}, "x is int32"),
    ({"norm": torch.ones(39)}, "norm has 39 elements, expected 40"),
    ({"b": []}, "b has 0 weights, expected q, k, v, o, gate, up and down"),
    ({"b_scale": []}, "b_scale has 0 tensors, expected 7"),
    ({"bias": [torch.ones(1)]}, "bias has 1 tensors, expected 0 or 7"),
    ({"a_scale": [torch.ones(1)]}, "a_scale has 1 tensors, expected 0 or 4"),
    ({"a_scale": [torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1)]}, "a_scale is 0, expected a positive"),
    ({"cos": torch.ones(1, 3, 9)}, r"cos has shape \[1, 3, 9\]"),
    ({"sin": torch.ones(1, 3, 10).half()}, "sin is float16 and x is float32"),
    ({"cos": torch.ones(1, 3, 16)}, "expected multiples of D=16"),
    ({"keys": torch.ones(2, 2, 6, 10)}, r"keys has shape \[2, 2, 6, 10\], expected contiguous \[2, 2, 7 or more, 10\]"),
    ({"values": torch.ones(2, 2, 12, 10).bfloat16()}, "values is bfloat16 and x is float32"),
    ({"past": -1}, "past is -1"),
    ({"mask": torch.ones(2, 1, 3, 6, dtype=torch.bool)}, r"mask is .* \[2, 1, 3, 6\], expected bool"),
    ({"scale": 0.0}, "scale is 0"),
    ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"q_norm": torch.ones(10)}, "one of q_norm and k_norm is given, expected both or neither"),
    ({"q_norm": torch.ones(10), "k_norm": torch.ones(40)}, "k_norm has 40 elements, expected 10"),
]


@pytest.mark.parametrize(("wrong", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(wrong: dict[str, Any], sentence: str) -> None:
    arguments = operands(2, 3, 4, torch.float32, False, False, torch.int8)
    before = arguments["keys"].clone()
    with pytest.raises(RuntimeError, match=f"w8a8_decoder_layer_: .*{sentence}"):
        ops.w8a8_decoder_layer_(**arguments | wrong)
    assert torch.equal(arguments["keys"], before)


INT8_CACHE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"keys_scale": None}, "one of keys_scale and values_scale is given, expected both or neither"),
    ({"keys": torch.ones(2, 2, 12, 10)}, "keys is float32, expected int8, because it has scales"),
    ({"keys_scale": torch.ones(2, 2, 12).half()}, "keys_scale is float16, expected float32"),
    ({"values_scale": torch.ones(2, 2, 11)}, r"values_scale has shape \[2, 2, 11\], expected contiguous \[2, 2, 12\]"),
    ({"values_scale": torch.ones(2, 12, 2).mT}, r"values_scale has shape \[2, 2, 12\], expected contiguous"),
    ({"keys_scale": None, "values_scale": None}, "keys is int8 and x is float32, expected the same dtype"),
]


@pytest.mark.parametrize(("wrong", "sentence"), INT8_CACHE_ERRORS, ids=[sentence for _, sentence in INT8_CACHE_ERRORS])
def test_errors_about_an_int8_cache(wrong: dict[str, Any], sentence: str) -> None:
    arguments = with_int8_cache(operands(2, 3, 4, torch.float32, False, False, torch.int8))
    with pytest.raises(RuntimeError, match=f"w8a8_decoder_layer_: {sentence}"):
        ops.w8a8_decoder_layer_(**arguments | wrong)


def test_opcheck() -> None:
    arguments = operands(2, 3, 4, torch.float32, False, False, torch.int8) | {"activation": "silu"}
    op = torch.ops.sq.w8a8_decoder_layer_.default
    torch.library.opcheck(op, tuple(arguments.values()))
    torch.library.opcheck(op, tuple(with_int8_cache(arguments).values()))
    torch.library.opcheck(op, tuple(with_head_norms(with_int8_cache(arguments)).values()))


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8"])
@pytest.mark.parametrize("model_type", FAMILY)
@pytest.mark.parametrize("cache_class", [DynamicCache, Int8Cache])
def test_models_of_the_family_have_the_same_bits(
    cache_class: type[DynamicCache], model_type: str, scheme: str, dtype: torch.dtype, calls: list[Tensor]
) -> None:
    model = quantized(model_type, scheme, dtype)
    assert {"model.layers.0", "model.layers.1"} <= set(model.smoothquant_report.fused)
    plain, ids = layer_by_layer(model), token_ids(3, 20, seed=8)
    caches = cache_class(config=model.config), cache_class(config=model.config)
    calls.clear()
    with torch.no_grad():
        for begin, end in ((0, 12), (12, 13), (13, 14), (14, 20)):
            ours, theirs = (
                one(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
                for one, cache in zip((model, plain), caches, strict=True)
            )
            assert torch.equal(ours, theirs)
    assert len(calls) == 4 * 2
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        if cache_class is Int8Cache:
            assert torch.equal(ours.keys_scale, theirs.keys_scale)
            assert torch.equal(ours.values_scale, theirs.values_scale)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ],
    ids=["greedy", "beam", "static", "prompt lookup"],
)
def test_generation_is_the_same(options: dict[str, Any]) -> None:
    model = quantized()
    plain, prompt = layer_by_layer(model), token_ids(2 if "prompt_lookup_num_tokens" not in options else 1, 12)
    mask = torch.ones_like(prompt)
    if len(prompt) > 1:
        mask[0, :4] = 0  # padding on the left
    expected = plain.generate(prompt, attention_mask=mask, max_new_tokens=20, **options)
    assert torch.equal(model.generate(prompt, attention_mask=mask, max_new_tokens=20, **options), expected)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "olmo2", "phi3", "stablelm", "gpt_neox", "opt"])
def test_what_computes_something_else_stays(model_type: str) -> None:
    model = quantized(model_type)
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedDecoderLayer)]
    # Gemma's layers are the family's own, but for the norm's offset and the activation.
    assert bool(fused) == (model_type == "gemma")


class Scaled(nn.Module):
    """An attention whose output is scaled a little: nothing that shapes or names would tell."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.__dict__.update(attention.__dict__)
        self.inner = type(attention).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, weights = self.inner(self, *args, **kwargs)
        return output * 1.01, weights


def test_a_small_difference_is_seen() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = Scaled(layer.self_attn)
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    parent.set_submodule(name, quantize_linear(linear, None, SCHEMES["int8"]))
    assert not any(name.rpartition(".")[2].isdigit() for name in fuse_(model))


def test_hooks_and_other_layers_are_called(calls: list[Tensor]) -> None:
    model = quantized()
    plain, ids = layer_by_layer(model), token_ids(1, 6)
    layer = model.model.layers[0]

    class Adapter(nn.Module):
        def __init__(self, base: W8A8Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x)

    with torch.no_grad():
        expected = plain(ids).logits
        for module in (layer.self_attn, layer.mlp, layer.input_layernorm, layer.self_attn.o_proj, layer.mlp.up_proj):
            calls.clear()
            seen: list[nn.Module] = []
            handle = module.register_forward_hook(lambda module, _args, _output, seen=seen: seen.append(module))
            assert torch.equal(model(ids).logits, expected)
            handle.remove()
            assert seen == [module]
            assert len(calls) == 1  # the other layer
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)
        calls.clear()
        assert torch.equal(model(ids).logits, expected)
        assert len(calls) == 1


def test_other_ways_to_call_go_module_by_module(calls: list[Tensor]) -> None:
    model = quantized()
    plain, ids = layer_by_layer(model), token_ids(1, 6)
    with torch.no_grad():
        expected = plain(ids)
        model(token_ids(MOST_ROWS // 8, 8))
        assert calls
        calls.clear()
        model(token_ids(MOST_ROWS // 8 + 1, 8))
        assert not calls
        calls.clear()
        static = StaticCache(config=model.config, max_cache_len=16)
        torch.testing.assert_close(model(ids, past_key_values=static, use_cache=True).logits, expected.logits)
        assert not calls
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        model.set_attn_implementation("sdpa")
        calls.clear()
        torch.testing.assert_close(model(ids).logits, expected.logits, rtol=1e-3, atol=1e-3)
        assert not calls
        model.set_attn_implementation("eager")
        assert len(model(ids, output_attentions=True).attentions) == 2


def test_copies_and_casts_are_fused_too(calls: list[Tensor]) -> None:
    model, ids = quantized(), token_ids(1, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
        calls.clear()
        assert torch.equal(twin(ids).logits, expected)
        assert len(calls) == 2
        wide, narrow = twin.to(torch.bfloat16), layer_by_layer(model).to(torch.bfloat16)
        assert torch.equal(wide(ids).logits, narrow(ids).logits)
