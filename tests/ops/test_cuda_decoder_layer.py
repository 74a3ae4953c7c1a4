"""w8a8_decoder_layer_ on an emulated GPU: the oracle's bits with torch's attention, its launches, its caches."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo  # which registering an op imports, and which looks for a GPU then
from decoder_layer_cases import (
    EVEN,
    Arguments,
    Sizes,
    joined,
    operands,
    variants,
    with_head_norms,
    with_int8_cache,
    with_mask,
    with_positions,
)
from emulated_cuda import emulated_cuda
from emulation import ROOT, emulated_library
from op_bounds import check_attention
from op_testing import assert_same_bits, randn, threads
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch_attention import torch_attention

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda import fallback
from smoothquant_ext.ops.cuda.cases import cases_of, difference

WRITTEN = ("keys", "values", "keys_scale", "values_scale")

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.fixture(autouse=True, scope="module")
def _device() -> Iterator[None]:
    with emulated_cuda(), threads(1):
        yield


def moved(move: Callable[[Tensor], Tensor], values: Any) -> Any:
    return tree_map_only(Tensor, move, values)


def run_there(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """On tensors of the emulated device that have the same memory: those side by side stay so."""
    args, kwargs = moved(torch.ops.emulated_cuda.there, (args, kwargs))
    return moved(torch.ops.emulated_cuda.back, op(*args, **kwargs))


def outputs(op: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """The result, and the cache after the call, of which each call gets a copy."""
    own = arguments | {name: arguments[name].clone() for name in WRITTEN if name in arguments}
    return [op(**own), *(own[name] for name in WRITTEN if name in own)]


def on_device(arguments: Arguments) -> list[Tensor]:
    return outputs(partial(run_there, ops.w8a8_decoder_layer_), arguments)


def expected(arguments: Arguments) -> list[Tensor]:
    attention = partial(run_there, torch_attention)
    with patch("smoothquant_ext.reference.decoder_layer.attention", attention):
        return outputs(reference.w8a8_decoder_layer_, arguments)


def check(arguments: Arguments, what: object = "") -> None:
    for actual, one in zip(on_device(arguments), expected(arguments), strict=True):
        assert_same_bits(actual, one, what)


# --- results --------------------------------------------------------------------------------------------------------


def test_every_way_equals_the_oracle() -> None:
    for name, arguments in variants():
        check(arguments, name)


@pytest.mark.parametrize("way", ["mma", "wgmma", "torch", "library", "skinny"])
def test_the_last_product_adds_the_residual_on_every_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOOTHQUANT_CUDA_GEMM", way)
    check(joined(operands(2, 10, 3, torch.bfloat16, EVEN)), way)


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("rotate", [[64, 32, 16, 32], [16, 0, 0, 0], [0, 16, 0, 0], [0, 0, 32, 0], [0, 0, 0, 16]])
def test_what_layers_read_may_be_rotated(rotate: list[int], tokens: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        arguments = operands(2, tokens, 3, dtype, Sizes(64, 96, 24, 4, 2)) | {"rotate": rotate}
        check(arguments, rotate)
        check(joined(arguments), rotate)
        y, *_ = outputs(partial(run_there, fallback.w8a8_decoder_layer_), arguments)
        assert_same_bits(y, on_device(arguments)[0], rotate)


def test_residuals_of_products_in_pieces() -> None:
    check(operands(1, 300, 0, torch.bfloat16, EVEN))


def test_positions_may_be_anywhere() -> None:
    for arguments in (operands(2, 3, 4), with_int8_cache(operands(2, 3, 4))):
        check(with_positions(arguments, 11, 0, 6))


def test_a_token_without_room_is_not_stored_and_gets_no_result() -> None:
    for arguments in (operands(2, 3, 4), with_int8_cache(operands(2, 3, 4))):
        for outside in (12, -1, 2**40):
            y, *after = on_device(with_positions(arguments, 4, outside, 5))
            inside, *stored = on_device(with_positions(arguments, 4, 6, 5))
            assert y[:, 1].isnan().all()
            assert_same_bits(y[:, 0], inside[:, 0])
            assert not y[:, 2].isnan().any()
            before = [arguments[name] for name in WRITTEN if name in arguments]
            for one, other, old in zip(after, stored, before, strict=True):
                assert_same_bits(one[:, :, :6], other[:, :, :6])
                assert_same_bits(one[:, :, 6:], old[:, :, 6:])


def test_a_row_that_is_not_finite_spoils_no_other_sequence() -> None:
    arguments = with_positions(operands(3, 1, 5))
    clean = on_device(arguments)[0]
    arguments["x"][1, 0, 3] = torch.nan
    y = on_device(arguments)[0]
    assert y[1].isnan().all()
    assert_same_bits(y[[0, 2]], clean[[0, 2]])


def test_layouts_of_masks_and_inputs() -> None:
    plain = with_mask(with_positions(operands(2, 3, 4)), heads=4)
    y = on_device(plain)[0]
    masks = {
        "transposed": plain["mask"].transpose(2, 3).contiguous().transpose(2, 3),
        "strided": plain["mask"].repeat_interleave(2, 3)[..., ::2],
        "heads last": plain["mask"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    }
    for name, mask in masks.items():
        assert_same_bits(on_device(plain | {"mask": mask})[0], y, name)
    shared = with_mask(plain, batch=1)
    expanded = shared["mask"].expand(2, 4, -1, -1)
    assert_same_bits(on_device(shared | {"mask": expanded})[0], on_device(shared)[0])
    strange = {
        "x": plain["x"].transpose(0, 1).contiguous().transpose(0, 1),
        "cos": plain["cos"].repeat_interleave(2, -1)[..., ::2],
        "sin": plain["sin"].mT.contiguous().mT,
        "positions": plain["positions"].repeat_interleave(2)[::2],
    }
    assert_same_bits(on_device(plain | strange)[0], y)


# --- launches -------------------------------------------------------------------------------------------------------

DECODE, PREFILL = joined(operands(2, 1, 7, sizes=EVEN)), joined(operands(2, 10, 0, sizes=EVEN))


@pytest.fixture
def _fast_attention() -> Iterator[None]:
    """torch's attention as fast kernels of GPUs leave their result: that of the CPU does the same."""

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = moved(torch.ops.emulated_cuda.back, (args, kwargs))
        y: Tensor = torch.ops.emulated_cuda.there(torch.nn.functional.scaled_dot_product_attention(*args, **kwargs))
        return y

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "CUDA")
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (PREFILL, 14),
        (DECODE, 10),
        (with_positions(DECODE), 10),
        (with_mask(DECODE), 10),
        (with_int8_cache(PREFILL), 15),
        (with_int8_cache(with_positions(DECODE)), 11),
        (with_mask(PREFILL), 15),
        (operands(2, 10, 0, sizes=EVEN), 20),
    ],
)
@pytest.mark.usefixtures("_fast_attention")
def test_launches(arguments: Arguments, count: int) -> None:
    """With torch's attention, around which nothing is copied."""
    launches = ctypes.CDLL(str(emulated_library())).sq_emulated_launches
    own = moved(torch.ops.emulated_cuda.there, arguments)
    before = launches()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.w8a8_decoder_layer_(**own)
    names = [event.name for event in profile.events()]
    assert launches() - before + names.count("aten::scaled_dot_product_attention") == count + 1  # it calls itself
    assert not {"aten::copy_", "aten::clone", "aten::cat", "aten::add"} & set(names)


# --- the proof and the fallback -------------------------------------------------------------------------------------


def test_the_cases_of_the_proof_have_one_right_result() -> None:
    """Of the kernels, and of other ops in their place: whoever attends, and in whatever order."""
    for case in cases_of("decoder_layer"):
        for op in (ops.w8a8_decoder_layer_, fallback.w8a8_decoder_layer_):
            results = case.run(op, "cuda")
            assert difference(case, results, "decoder_layer") == "", (op, case.name)
            for each in results:
                element = each.view(-1)[-1:]
                right = element.clone()
                element.fill_(2.0 if right.item() == 1.0 else 1.0)
                assert "1 of" in difference(case, results, "decoder_layer")
                element.copy_(right)


@pytest.mark.parametrize(("batch", "time", "past"), [(2, 1, 4), (1, 5, 0), (2, 3, 4), (2, 0, 3)])
def test_the_fallback_fills_the_cache_as_the_oracle(batch: int, time: int, past: int) -> None:
    for change in (with_int8_cache, with_positions, with_head_norms, lambda same: same):
        arguments = change(operands(batch, time, past, torch.bfloat16))
        y, *cache = outputs(partial(run_there, fallback.w8a8_decoder_layer_), arguments)
        expected_y, *expected_cache = outputs(reference.w8a8_decoder_layer_, arguments)
        for actual, one in zip(cache, expected_cache, strict=True):
            assert_same_bits(actual, one)
        assert (y.dtype, y.shape) == (expected_y.dtype, expected_y.shape)


# --- torch's attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)], ids=str)
def test_torch_attends_as_the_oracle(heads: tuple[int, int]) -> None:
    """The shapes that it is called with are the attention that is meant."""
    for batch, time, length in ((1, 1, 1), (2, 1, 9), (2, 4, 4), (2, 3, 11)):
        q = randn(batch, heads[0], time, 8)
        k, v = randn(2, batch, heads[1], length, 8, seed=1)
        (k8, k_scale), (v8, v_scale) = (reference.quantize_per_token(each, torch.int8) for each in (k, v))
        caches: tuple[tuple[Any, ...], ...] = ((k, v, {}), (k8, v8, {"k_scale": k_scale, "v_scale": v_scale}))
        masks = [None, *(randn(b, h, time, length) > -0.5 for b in {1, batch} for h in {1, heads[0]})]
        for (keys, values, scales), mask, causal in itertools.product(caches, masks, (False, True)):
            if mask is not None:
                mask[..., 0] = True
            arguments = {"q": q, "k": keys, "v": values, "mask": mask, "scale": 0.25, "causal": causal, **scales}
            check_attention(torch_attention(**arguments), reference.attention(**arguments), arguments)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"x": torch.ones(2, 40)}, r"x has shape \[2, 40\], expected \[B, T, K\]"),
        ({"past": -1}, "past is -1, expected 0 or more"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        (
            {"input_scale": [torch.ones(2), None, None, None]},
            r"input_scale\[0\] \(q, k, v\) has 2 elements, expected 1",
        ),
        ({"positions": torch.arange(3), "causal": False}, "neither mask nor causal hides what was not written yet"),
        ({"positions": torch.arange(3).int()}, "positions is int32, expected int64"),
        (
            {"rotate": [0, 0, 0, 16]},
            r"rotate\[3\] \(down\) is 16, expected .* that divides the 70 values",
        ),
    ],
)
def test_errors_are_those_of_the_cpu(wrong: dict[str, Any], sentence: str) -> None:
    for op in (ops.w8a8_decoder_layer_, fallback.w8a8_decoder_layer_):
        with pytest.raises(RuntimeError, match=f"w8a8_decoder_layer_: .*{sentence}"):
            run_there(op, **operands(2, 3, 4) | wrong)
