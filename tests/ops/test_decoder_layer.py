"""w8a8_decoder_layer_, bit for bit against the oracle on every CPU ISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_layer_cases import (
    Arguments,
    Sizes,
    operands,
    with_biases,
    with_head_norms,
    with_int8_cache,
    with_mask,
    with_positions,
    with_static_scales,
)
from op_cases import CASES, call, expected_of
from op_testing import ISAS, assert_same_bits, cpu_isa

from smoothquant_ext import ops


def packed(arguments: Arguments) -> Arguments:
    """The same with the weights as the CPU reads them fastest."""
    return arguments | {"weight": [ops.prepack_weight(weight) for weight in arguments["weight"]]}


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
        plain = packed(operands(batch, time, past, dtype))
        for arguments in (plain, with_biases(plain), with_static_scales(plain)):
            check_op(arguments)
            check_op(with_int8_cache(arguments))
            check_op(with_head_norms(arguments))
            check_op(with_head_norms(with_int8_cache(arguments)))
        for rotate in ([64, 32, 16, 32], [16, 0, 0, 0], [0, 16, 0, 0], [0, 0, 32, 0], [0, 0, 0, 16]):
            turned = packed(operands(batch, time, past, dtype, Sizes(64, 96, 24, 4, 2))) | {"rotate": rotate}
            check_op(turned)
            check_op(with_static_scales(with_int8_cache(turned)))
        for dynamic in ((3,), (0, 2), (1,)):
            check_op(with_static_scales(plain, dynamic))


@pytest.mark.parametrize("isa", ISAS)
def test_the_op_with_a_mask_and_with_weights_that_are_not_packed(isa: str) -> None:
    with cpu_isa(isa):
        arguments = with_mask(operands(2, 5, 9))
        check_op(arguments)
        check_op(packed(arguments))
        check_op(packed(with_int8_cache(arguments)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("batch", "time", "past"), [(1, 1, 0), (2, 1, 17), (2, 5, 9), (1, 8, 0)])
def test_new_tokens_go_where_positions_say(batch: int, time: int, past: int, isa: str) -> None:
    with cpu_isa(isa):
        for dtype in (torch.float32, torch.bfloat16):
            behind = operands(batch, time, past, dtype) | {"causal": True}
            for arguments in (behind, with_int8_cache(behind)):
                positioned = with_positions(arguments)
                check_op(positioned)
                check_op(with_mask(positioned))
                check_op(with_mask(positioned, batch=1, heads=4, causal=True))
                # Causal, they are what `past` says too.
                *outputs, _ = call(ops.w8a8_decoder_layer_, positioned)
                for one, other in zip(outputs, call(ops.w8a8_decoder_layer_, arguments), strict=True):
                    assert_same_bits(one, other)


def test_a_row_of_keys_that_were_not_written_yet_is_not_seen() -> None:
    arguments = operands(2, 1, 4)
    garbage = with_positions(arguments)
    garbage["keys"], garbage["values"] = arguments["keys"].clone(), arguments["values"].clone()
    garbage["keys"][:, :, 5:], garbage["values"][:, :, 5:] = 1e6, -1e6
    assert_same_bits(ops.w8a8_decoder_layer_(**garbage), ops.w8a8_decoder_layer_(**arguments))


def test_keys_and_values_may_have_different_room() -> None:
    arguments = operands(2, 3, 4)
    expected = ops.w8a8_decoder_layer_(**arguments)
    for own in (arguments, with_int8_cache(arguments)):
        own = own | {name: own[name][:, :, :7].contiguous() for name in ("values", "values_scale") if name in own}
        check_op(own)
        if own["keys"].dtype == torch.float32:
            assert torch.equal(ops.w8a8_decoder_layer_(**own), expected)


def test_a_row_that_is_not_finite_spoils_no_other_sequence() -> None:
    arguments = operands(3, 1, 5)
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
    ({"rotate": [32, 0, 0, 0]}, r"rotate\[0\] \(q, k, v\) is 32, expected .* that divides the 40 values of a row"),
    ({"rotate": [0, 32, 0, 0]}, r"rotate\[1\] \(o\) is 32, expected .* that divides the 40 values of a row"),
    ({"rotate": [0, 0, 24, 0]}, r"rotate\[2\] \(gate, up\) is 24, expected 0 or a power of two"),
    ({"rotate": [16]}, "rotate has 1 elements, expected 0 or 4"),
    (
        {"rotate": [0, 0, 0, 32]},
        r"rotate\[3\] \(down\) is 32, expected .* that divides the 70 values of a row",
    ),
]

POSITIONS_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"positions": torch.arange(3).int()}, "positions is int32, expected int64"),
    ({"positions": torch.arange(4)}, r"positions has shape \[4\], expected \[T=3\]"),
    ({"positions": torch.arange(3)[None]}, r"positions has shape \[1, 3\], expected \[T=3\]"),
    (
        {"positions": torch.tensor([4, 5, 7])},
        r"positions\[2\] is 7 and positions\[0\] is 4, expected one after the other",
    ),
    ({"positions": torch.tensor([10, 11, 12])}, "positions begins with 10, expected 0 to room - T=9"),
    ({"positions": torch.tensor([-1, 0, 1])}, "positions begins with -1, expected 0 to room - T=9"),
    ({"causal": False}, "positions is given, and neither mask nor causal hides what was not written yet"),
    ({"mask": torch.ones(2, 1, 3, 7, dtype=torch.bool)}, r"mask has shape \[2, 1, 3, 7\], expected .*, 3, 12\]"),
    ({"values": torch.ones(2, 2, 11, 10)}, r"keys has shape \[2, 2, 12, 10\] and values \[2, 2, 11, 10\], expected"),
    ({"keys": torch.ones(2, 2, 2, 10), "values": torch.ones(2, 2, 2, 10)}, r"contiguous \[2, 2, 3 or more, 10\]"),
]


@pytest.mark.parametrize(("wrong", "sentence"), POSITIONS_ERRORS, ids=[sentence for _, sentence in POSITIONS_ERRORS])
def test_errors_about_positions(wrong: dict[str, Any], sentence: str) -> None:
    arguments = with_positions(operands(2, 3, 4))
    before = arguments["keys"].clone()
    with pytest.raises(RuntimeError, match=f"w8a8_decoder_layer_: .*{sentence}"):
        ops.w8a8_decoder_layer_(**arguments | wrong)
    assert torch.equal(arguments["keys"], before)


@pytest.mark.parametrize(("wrong", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(wrong: dict[str, Any], sentence: str) -> None:
    arguments = operands(2, 3, 4)
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
    arguments = with_int8_cache(operands(2, 3, 4))
    with pytest.raises(RuntimeError, match=f"w8a8_decoder_layer_: {sentence}"):
        ops.w8a8_decoder_layer_(**arguments | wrong)
