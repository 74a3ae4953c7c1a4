"""w8a8_decoder_layer_, bit for bit against the oracle on every CPU ISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import CASES, call, expected_of
from op_testing import ISAS, assert_same_bits, cpu_isa, randn

from smoothquant_ext import ops, reference


def operands(
    batch: int, time: int, past: int, dtype: torch.dtype, has_bias: bool, is_static: bool, eight_bit: torch.dtype
) -> dict[str, Any]:
    k, d, heads, kv_heads, inner = 40, 10, 4, 2, 70
    shapes = [(heads * d, k), (kv_heads * d, k), (kv_heads * d, k), (k, heads * d), (inner, k), (inner, k), (k, inner)]
    weights = [reference.quantize_per_token(randn(*shape, seed=i), eight_bit) for i, shape in enumerate(shapes)]
    angles = randn(1 if batch == 1 else batch, time, d, seed=20)
    biases = [randn(shape[0], seed=30 + i) if i % 2 == 0 else None for i, shape in enumerate(shapes)]
    cache = randn(2, batch, kv_heads, past + time + 5, d, seed=21, dtype=dtype)
    return {
        "x": randn(batch, time, k, dtype=dtype),
        "norm": randn(k, seed=22, dtype=dtype),
        "post_norm": randn(k, seed=23),
        "eps": 1e-5,
        "post_eps": 1e-6,
        "offset": 1.0 if has_bias else 0.0,
        "weight": [ops.prepack_weight(weight) for weight, _ in weights],
        "weight_scale": [scale for _, scale in weights],
        "bias": biases if has_bias else None,
        "input_scale": [torch.tensor([value]) for value in (0.02, 0.03, 0.04, 0.05)] if is_static else None,
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
    """The bits of the oracle with our attention, in the result and in the cache."""
    expected = expected_of(CASES["w8a8_decoder_layer_"], arguments)
    for actual, one in zip(call(ops.w8a8_decoder_layer_, arguments), expected, strict=True):
        assert_same_bits(actual, one)


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
                mixed["input_scale"] = [None if i in dynamic else s for i, s in enumerate(mixed["input_scale"])]
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
        arguments["weight"] = [
            ops.unpack_weight(weight, scale.numel(), 70 if i == 6 else 40)
            for i, (weight, scale) in enumerate(zip(arguments["weight"], arguments["weight_scale"], strict=True))
        ]
        check_op(arguments)


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
    ({"norm": torch.ones(39)}, "norm has 39 elements, expected K=40"),
    ({"weight": []}, r"weight has 0 elements, expected 7 \(q, k, v, o, gate, up, down\)"),
    ({"weight_scale": []}, "weight_scale has 0 elements, but weight has 7"),
    ({"bias": [torch.ones(1)]}, "bias has 1 elements, expected 0 or 7"),
    ({"input_scale": [None]}, "input_scale has 1 elements, expected 0 or 4"),
    ({"input_scale": [None, None, torch.zeros(1), None]}, r"input_scale\[2\] \(gate, up\) is 0, expected a positive"),
    ({"cos": torch.ones(1, 3, 9)}, r"cos has shape \[1, 3, 9\]"),
    ({"sin": torch.ones(1, 3, 10).half()}, "sin is float16 and x is float32"),
    ({"cos": torch.ones(1, 3, 16)}, "expected multiples of D=16"),
    ({"keys": torch.ones(2, 2, 6, 10)}, r"keys has shape \[2, 2, 6, 10\], expected contiguous \[2, 2, 7 or more, 10\]"),
    ({"values": torch.ones(2, 2, 12, 10).bfloat16()}, "values is bfloat16 and x is float32"),
    ({"past": -1}, "past is -1"),
    ({"mask": torch.ones(2, 1, 3, 6, dtype=torch.bool)}, r"mask has shape \[2, 1, 3, 6\], expected .*, 3, 7\]"),
    ({"scale": 0.0}, "scale is 0"),
    ({"activation": "tanh"}, "activation is 'tanh'"),
    ({"q_norm": torch.ones(10)}, "one of q_norm and k_norm is given, expected both or neither"),
    ({"q_norm": torch.ones(10), "k_norm": torch.ones(40)}, "k_norm has 40 elements, expected D=10"),
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
