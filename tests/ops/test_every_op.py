"""What holds for every op, by the table of op_cases: the oracle's results, its schema, and what torch relies on."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_cases import CASES, Arguments, OpCase, Problem, Results, call, expected_of, flat, public_ops
from op_testing import EIGHT_BIT, assert_same_bits, backends, non_contiguous, threads
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.declare import DECLARED

every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_rows = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.rows], ids=[name for name, case in CASES.items() if case.rows]
)


def test_every_op_is_declared_has_an_oracle_and_a_row_in_the_table() -> None:
    assert public_ops() == set(CASES) == set(DECLARED)
    for name in CASES:
        assert callable(getattr(ops, name))
        assert callable(getattr(reference, name))


# --- signatures -----------------------------------------------------------------------------------------------------

# What a schema calls the types of a signature; float8 and the others are dtypes, which are integers there.
TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Optional[Tensor]",
    Sequence[Tensor]: "List[Tensor]",
    Sequence[int]: "List[int]",
    Sequence[Tensor | None] | None: "Optional[List[Optional[Tensor]]]",
    torch.dtype: "int",
    torch.dtype | None: "Optional[int]",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    list[Tensor]: "List[Tensor]",
}
DTYPES = {torch.bfloat16: 15}  # ScalarType's number


@every_op
def test_the_schema_is_the_signature(case: OpCase) -> None:
    function, schema = DECLARED[case.name].fake, case.op._schema  # type: ignore[attr-defined]
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    declared = [
        (name, TYPES[hints[name]], argument.default, argument.kind is argument.KEYWORD_ONLY)
        for name, argument in signature.parameters.items()
    ]
    compiled = [
        (a.name, str(a.type), a.default_value if a.has_default_value() else inspect.Parameter.empty, a.kwarg_only)
        for a in schema.arguments
    ]
    declared = [(*one, DTYPES.get(default, default), only) for *one, default, only in declared]
    assert [(*one, [] if default == () else default, only) for *one, default, only in declared] == compiled
    result = hints["return"]
    results = typing.get_args(result) if typing.get_origin(result) is tuple else (result,)
    assert [TYPES[each] for each in results] == [str(each.type) for each in schema.returns]
    assert inspect.signature(case.op) == signature
    assert case.op.__doc__ == function.__doc__


@every_op
def test_the_oracle_has_the_signature_of_the_op(case: OpCase) -> None:
    oracle: types.FunctionType = getattr(reference, case.name)
    assert inspect.signature(oracle) == inspect.signature(case.op)


# --- results --------------------------------------------------------------------------------------------------------

SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((0,), 8, 5),
    ((1,), 1, 1),
    ((), 31, 3),
    ((3,), 15, 70),
    ((2,), 16, 64),
    ((5,), 17, 2),
    ((2, 3), 100, 9),
    ((2, 0, 3), 64, 4),
    ((7,), 64, 65),
    ((33,), 577, 33),
    # Blocks of 32 to 256 to rotate, in rows and inside of an MLP; the shapes above have those of 16 and 64.
    ((3,), 96, 121),
    ((2,), 384, 57),
    ((3,), 512, 249),
]
LONG: list[tuple[tuple[int, ...], int, int]] = [((4,), 4096, 8), ((2,), 8200, 3)]


def check(case: OpCase, problem: Problem, change: Callable[[Arguments], Arguments] = lambda same: same) -> Results:
    """Every way to call an op, on every backend; the results of the last call."""
    results: Results = []
    for variant, arguments in enumerate(map(change, case.make(problem))):
        given = ", ".join(arguments)
        for number, device in enumerate(backends()):
            results = call(case.op, arguments, device)
            what = (problem, variant, given, f"backend {number}")
            case.check(results, expected_of(case, arguments, device), arguments, what)
    return results


@every_op
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle(shape: tuple[Any, ...], case: OpCase) -> None:
    for problem in case.problems(*shape):
        check(case, problem)


@every_op
def test_equals_the_oracle_on_long_rows(case: OpCase) -> None:
    for shape, dtype in zip(LONG, case.floats * 2, strict=False):
        check(case, Problem(*shape, dtype))


@by_rows
def test_strange_rows_touch_no_other(case: OpCase) -> None:
    def make_strange(arguments: Arguments) -> Arguments:
        x = arguments[case.rows[0]].clone()
        x[1, 3], x[2, 4], x[3], x[4, 0] = torch.nan, torch.inf, 0.0, -torch.inf
        return arguments | {case.rows[0]: x}

    for problem in (*case.problems((7,), 70, 20), *case.problems((7,), 64, 25)):  # the latter can be rotated
        if problem.dtype != case.floats[0]:
            continue
        for arguments in case.make(problem):
            strange = make_strange(arguments)
            for device in backends():
                clean, results = call(case.op, arguments, device), call(case.op, strange, device)
                if case.check is CASES["rms_norm"].check:
                    case.check(results, expected_of(case, strange, device), strange, problem)
                for one, other in zip(results, clean, strict=True):
                    if one.dim() and len(one) == 7:
                        assert_same_bits(one[[0, 5, 6]], other[[0, 5, 6]], (problem, device))


@by_rows
def test_a_row_does_not_depend_on_the_others(case: OpCase) -> None:
    for problem in (*case.problems((40,), 130, 20), *case.problems((40,), 128, 25)):
        if problem.dtype != case.floats[-1]:
            continue
        for arguments in case.make(problem):
            rows = {name: arguments[name] for name in case.rows if arguments.get(name) is not None}
            for device in backends():
                together = flat(case.op(**arguments)) if device == "cpu" else call(case.op, arguments, device)
                for row in (0, 20, 39):
                    own = arguments | {name: value[row] for name, value in rows.items()}
                    for alone, every in zip(call(case.op, own, device), together, strict=False):
                        if every.dim() and len(every) == 40:
                            assert_same_bits(alone, every[row], (problem, row, device))


def laid_out(value: Any, layout: str) -> Any:
    """The same values in a tensor, or in those of a list, that is not contiguous where it can be."""
    if isinstance(value, list):
        return [laid_out(each, layout) for each in value]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    as_bytes = value.view(torch.int8) if value.dtype in EIGHT_BIT else value
    return non_contiguous(as_bytes)[layout].view(value.dtype)


@every_op
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_inputs_that_are_not_contiguous(layout: str, case: OpCase) -> None:
    for problem in (*case.problems((6,), 70, 66), *case.problems((6,), 64, 25)):
        if problem.dtype != case.floats[0]:
            continue
        for arguments in case.make(problem):
            other = {
                name: value if name in case.contiguous else laid_out(value, layout) for name, value in arguments.items()
            }
            for device in backends():
                if device == "cpu":
                    expected = call(case.op, arguments)
                    for one, same in zip(flat(case.op(**other)), expected, strict=False):
                        assert_same_bits(one, same, layout)


@every_op
def test_any_number_of_threads_gives_the_same_bits(case: OpCase) -> None:
    for shape in (((300,), 200, 100), ((2,), 577, 1000), ((64,), 256, 121)):
        for eight_bit in case.eight_bit[:2]:
            *_, arguments = case.make(Problem(*shape, case.floats[-1], eight_bit))
            outputs = []
            for count in (1, 2, 3, 7):
                with threads(count):
                    outputs.append(call(case.op, arguments))
            for output in outputs[1:]:
                for one, other in zip(output, outputs[0], strict=True):
                    assert_same_bits(one, other, shape)


# --- devices --------------------------------------------------------------------------------------------------------


@every_op
def test_tensors_on_different_devices_are_refused(case: OpCase) -> None:
    *_, arguments = case.make(Problem())
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    first, *others = tensors
    for name in others:
        wrong = arguments | {name: arguments[name].to("meta")}
        with pytest.raises(RuntimeError, match=f"{case.name}: {name} is on meta, but {first} is on cpu"):
            case.op(**wrong)
    for name, values in arguments.items():
        for i, value in enumerate(values if isinstance(values, list) else []):
            if isinstance(value, Tensor):
                wrong = arguments | {name: [*values[:i], value.to("meta"), *values[i + 1 :]]}
                # An optional list's tensors do not choose the device that is dispatched to.
                sentence = rf"{name}\[{i}\].* is on (meta, but {first} is on cpu|another device than )"
                with pytest.raises(RuntimeError, match=sentence):
                    case.op(**wrong)


def on(device: str, value: Any) -> Any:
    """Tensors of the same shapes and dtypes, without values, on a device."""
    if isinstance(value, list):
        return [on(device, each) for each in value]
    return torch.empty_like(value, device=device) if isinstance(value, Tensor) else value


@every_op
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_fake_tensors_give_shapes(device: str, case: OpCase) -> None:
    """On meta, and of fake tensors on a GPU, which need none: what ``torch.compile`` traces there."""
    for problem in (*case.problems((2, 3), 70, 130), *case.problems((2, 3), 64, 121)):
        for arguments in case.make(problem):
            expected = call(case.op, arguments)
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = flat(case.op(**{name: on(device, value) for name, value in arguments.items()}))
            for one, real in zip(fake, expected, strict=False):
                assert (one.shape, one.dtype, one.device.type) == (real.shape, real.dtype, device), problem


# --- torch ----------------------------------------------------------------------------------------------------------

# test_schema compares inputs with allclose, which torch lacks for float8 on the CPU.
FLOAT8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ALL_CHECKS = ("test_schema", *FLOAT8_CHECKS)


@every_op
def test_opcheck(case: OpCase) -> None:
    for arguments in case.make(Problem(k=80, dtype=case.floats[-1])):
        torch.library.opcheck(case.op, (), arguments, test_utils=ALL_CHECKS)  # type: ignore[arg-type]
    for eight_bit in case.eight_bit[1:]:
        *_, arguments = case.make(Problem(k=80, dtype=case.floats[-1], eight_bit=eight_bit))
        torch.library.opcheck(case.op, (), arguments, test_utils=FLOAT8_CHECKS)  # type: ignore[arg-type]


@every_op
@torch._dynamo.config.patch(specialize_float=True)  # an epsilon is a constant of its model
def test_compile_makes_one_graph_for_every_batch_size(case: OpCase) -> None:
    for eight_bit in case.eight_bit[:2]:
        # The first sizes are unlike every size of the weights: torch takes equal ones for the same.
        problems = [Problem(leading, 80, 25, case.floats[-1], eight_bit) for leading in ((13, 19), (7, 8), (11, 2))]
        for variants in zip(*(case.make(problem) for problem in problems), strict=True):
            constants = {name: value for name, value in variants[0].items() if not isinstance(value, Tensor | list)}
            counter = CompileCounterWithBackend("aot_eager")
            op = functools.partial(case.op, **constants)
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda op=op, **tensors: op(**tensors), backend=counter, fullgraph=True, dynamic=True
            )
            for arguments in variants:
                tensors = {name: value for name, value in arguments.items() if name not in constants}
                for actual, expected in zip(call(compiled, tensors), call(op, tensors), strict=True):
                    assert_same_bits(actual, expected, list(arguments))
            assert counter.frame_count == 1, list(variants[0])
