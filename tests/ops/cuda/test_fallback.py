"""What holds for every op through torch alone, by the table of op_cases; test_fallback_*.py have the numbers."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import CASES, OpCase, Problem, call, expected_of, flat
from op_testing import Call, assert_same_bits, moved_to, non_contiguous
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch_rules import CudaRules

from smoothquant_ext import ops
from smoothquant_ext.ops.cuda import fallback_gemm
from smoothquant_ext.ops.cuda.fallback import FALLBACKS

ALONE = {
    "_gemm_by_torch": "w8a8_gemm"
}  # names in the table that are no public ops, and the ops whose arguments they have
NOT_NEEDED = {"prepack_weight"}
NORMS = {"rms_norm", "rms_norm_quantize", "layer_norm_quantize"}
ACTIVATIONS = {"silu_mul_quantize", "gelu_mul_quantize", "gelu_quantize", "relu_quantize"}
CLOSE = (
    NORMS | ACTIVATIONS | {"attention"}
)  # and not bit for bit: compared in test_fallback_quantize.py and _floating.py

# The decoder layer is in test_cuda_decoder_layer.py.
cases = [CASES[name] for name in FALLBACKS if name in CASES and name != "w8a8_decoder_layer_"]
HOPPER, ARCHS = 90, (75, 80, 89, 90, 100)
on_every_arch = pytest.mark.parametrize(
    ("case", "arch"),
    [(case, arch) for case in cases for arch in (ARCHS if case.name in ("w8a8_gemm", "w8a8_linear") else (HOPPER,))],
    indirect=["arch"],
    ids=lambda value: getattr(value, "name", str(value)),
)
every_op = pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((0,), 8, 5),
    ((1,), 1, 1),
    ((), 31, 3),
    ((5,), 17, 2),
    ((2, 0, 3), 64, 4),
    ((17,), 64, 64),
    ((2, 9), 100, 33),
    ((3,), 512, 121),  # rows in blocks of 256 to rotate, and of 128 inside of an MLP
]


def test_every_op_that_a_model_needs_has_a_fallback() -> None:
    assert set(FALLBACKS) == set(CASES) - NOT_NEEDED | set(ALONE)


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_signature_is_that_of_the_op(name: str) -> None:
    op: Any = getattr(ops, ALONE.get(name, name))
    assert inspect.signature(FALLBACKS[name]) == inspect.signature(op)


# --- results --------------------------------------------------------------------------------------------------------


def exact_product(operands: fallback_gemm.Operands) -> Tensor:
    sums = operands.a.float().double() @ operands.b.float().double().t()
    return fallback_gemm.scaled(sums, operands)


@on_every_arch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(shape: tuple[Any, ...], case: OpCase, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit but for what has its own tests; for all, shapes, dtypes and layouts."""
    if case.name == "w8a8_experts":  # the oracle multiplies more rows at a time, and the order of sums depends on that
        exact = dict.fromkeys(("fp8", "fp8_rows", "wide"), exact_product)
        monkeypatch.setattr(fallback_gemm, "PRODUCTS", {**fallback_gemm.PRODUCTS, **exact})
    for problem in case.problems(*shape, packs=False):
        for arguments in case.make(problem):
            results, expected = call(case.op, arguments), expected_of(case, arguments)
            if case.name not in CLOSE:
                case.check(results, expected, arguments, (problem, list(arguments)))
            assert [(one.shape, one.dtype) for one in results] == [(one.shape, one.dtype) for one in expected]
            for result in flat(case.op(**arguments)):
                assert result.is_contiguous(), (problem, list(arguments))


@every_op
@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_inputs_that_are_not_contiguous(layout: str, case: OpCase) -> None:
    def laid_out(value: Any) -> Any:
        if isinstance(value, list):
            return [laid_out(each) for each in value]
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        bits = value.view(torch.int8) if value.element_size() == 1 and value.dtype != torch.bool else value
        return non_contiguous(bits)[layout].view(value.dtype)

    for eight_bit in case.eight_bit:
        for arguments in case.make(Problem((6,), 70, 66, case.floats[0], eight_bit, packs=False)):
            other = {name: laid_out(value) for name, value in arguments.items()}
            if case.name == "attention":  # torch's has kernels for some layouts
                results = call(case.op, other)[:1]
                case.check(results, expected_of(case, arguments), arguments, layout)
                continue
            for one, same in zip(flat(case.op(**other)), flat(case.op(**arguments)), strict=True):
                assert_same_bits(one, same, layout)


@pytest.mark.parametrize("case", [case for case in cases if case.rows], ids=lambda case: case.name)
@pytest.mark.usefixtures("by_torch")
def test_strange_rows_touch_no_other(case: OpCase) -> None:
    for eight_bit in case.eight_bit:
        for arguments in case.make(Problem((7,), 70, 20, case.floats[0], eight_bit, packs=False)):
            x = arguments[case.rows[0]].clone()
            x[1, 3], x[2, 4], x[3], x[4, 0] = torch.nan, torch.inf, 0.0, -torch.inf
            strange = arguments | {case.rows[0]: x}
            clean, results = flat(case.op(**arguments)), flat(case.op(**strange))
            expected = flat(expected_of(case, strange))
            for one, other, oracle in zip(results, clean, expected, strict=False):
                if one.dim() and len(one) == 7:
                    assert_same_bits(one[[0, 5, 6]], other[[0, 5, 6]], (case.name, eight_bit))
                    assert torch.equal(one.float().isnan(), oracle.float().isnan())
                    assert torch.equal(one[3].float(), oracle[3].float())


# --- errors ---------------------------------------------------------------------------------------------------------


def module_of(name: str) -> Any:
    """The module of tests of the compiled ops with this name, of which the fallback passes some too."""
    path = Path(__file__).parents[1] / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fallback_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = module_of("test_contract")
REFUSED: list[tuple[Call, str]] = [
    *((call, re.escape(sentence)) for call, sentence in contract.QUANTIZE_ERRORS),
    *((call, re.escape(sentence)) for call, sentence in contract.GEMM_ERRORS + contract.LINEAR_ERRORS),
    *(
        row
        for name in ("norm_activation", "mlp_and_linear_group", "experts", "rotation")
        for row in module_of(f"test_{name}").ERRORS
    ),
]


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_an_error_is_the_sentence_of_the_compiled_op(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence) as error:
        call()
    assert len(str(error.value).splitlines()) == 1 or "Exception raised from" in str(error.value)


@pytest.mark.usefixtures("by_torch")
def test_errors_of_attention() -> None:
    module_of("test_attention").test_errors_name_the_culprit()


@every_op
def test_tensors_on_different_devices_are_refused(case: OpCase) -> None:
    *_, arguments = case.make(Problem(dtype=case.floats[0], packs=False))
    first, *others = (name for name, value in arguments.items() if isinstance(value, Tensor))
    for name in others:
        with pytest.raises(RuntimeError, match=f"{case.name}: {name} is on another device than {first}"):
            FALLBACKS[case.name](**arguments | {name: arguments[name].to("meta")})


# --- torch ----------------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("sq_by_torch", "DEF")  # its ops are there as long as it is


@functools.cache
def registered() -> Any:
    """The fallback as ops of the dispatcher, with the schemas of ``torch.ops.sq``."""
    for name, implementation in FALLBACKS.items():
        source = ALONE.get(name, name)
        schema = str(getattr(torch.ops.sq, source).default._schema).removeprefix(f"sq::{source}")
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, implementation, "CPU")
    return torch.ops.sq_by_torch


@pytest.mark.parametrize("name", FALLBACKS)
@pytest.mark.usefixtures("by_torch")
def test_the_dispatcher_calls_it(name: str) -> None:
    op, case = getattr(registered(), name), CASES[ALONE.get(name, name)]
    for arguments in case.make(Problem(dtype=case.floats[0], packs=False)):
        for one, other in zip(call(op, arguments), call(FALLBACKS[name], arguments), strict=True):
            assert_same_bits(one, other)


GRAPHS = [case for case in cases if case.name != "w8a8_experts"]  # which waits for the device


@pytest.mark.parametrize("case", GRAPHS, ids=lambda case: case.name)
@torch._dynamo.config.patch(specialize_float=True)  # an epsilon is a constant of its model
def test_compile_takes_it_whole(case: OpCase, by_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback_gemm, "arch_of", lambda device: 90)
    for eight_bit in case.eight_bit[: 2 if case.name == "w8a8_gemm" else 1]:
        problems = [Problem(leading, 70, 20, case.floats[-1], eight_bit, packs=False) for leading in ((13, 19), (7, 8))]
        every = [list(case.make(problem))[-1] for problem in problems]  # that take all arguments
        constants = {name: value for name, value in every[0].items() if not isinstance(value, Tensor | list)}
        counter = CompileCounterWithBackend("aot_eager")
        op = functools.partial(case.op, **constants)
        torch._dynamo.reset()
        compiled = torch.compile(lambda op=op, **tensors: op(**tensors), backend=counter, fullgraph=True, dynamic=True)
        for arguments in every:
            tensors = {name: value for name, value in arguments.items() if name not in constants}
            for actual, expected in zip(call(compiled, tensors), call(op, tensors), strict=True):
                assert_same_bits(actual, expected, list(arguments))
        assert counter.frame_count == 1


@on_every_arch
def test_nothing_waits_for_the_device(case: OpCase, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that have no values: whoever asks for one gets an error."""
    if case not in GRAPHS:
        return
    for module in ("fallback_experts", "fallback_quantize", "fallback_gemm", "fallback_floating"):
        monkeypatch.setattr(f"smoothquant_ext.ops.cuda.{module}.check", lambda *arguments: None)

    for problem in case.problems((2, 3), 70, 130, packs=False):
        for arguments in case.make(problem):
            expected = flat(case.op(**arguments))
            without = flat(case.op(**moved_to("meta", arguments)))
            assert [(one.shape, one.dtype) for one in without] == [(one.shape, one.dtype) for one in expected]
            assert all(one.is_meta and one.is_contiguous() for one in without), problem


@pytest.mark.usefixtures("by_torch")
def test_experts_wait_once_and_only_those_that_were_chosen_compute() -> None:
    arguments = list(CASES["w8a8_experts"].make(Problem((5,), 64, 32, packs=False)))[-1]
    arguments["top_k_index"] = torch.tensor([[0, 3], [2, 0], [3, 3], [0, 2], [2, 2]])  # 3 is none, and 1 is idle
    with CudaRules(90) as rules:
        ops.w8a8_experts(**arguments)
    assert rules.seen["int_mm"] == 2 * 3
    assert rules.seen["wait"] <= 5  # of one copy to the host
