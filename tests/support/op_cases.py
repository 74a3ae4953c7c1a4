"""Every op of ``torch.ops.sq`` in a row: how its arguments are made, and what holds for it.

The rows feed the tests of all ops (tests/ops/test_every_op.py, test_memory.py, test_cuda_emulated.py): a new op is
tested there once it has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from op_bounds import check_attention, check_experts, check_gemm, check_linear
from op_problem import SCALE, Arguments, Problem, mixed, positive, rotating
from op_testing import EIGHT_BIT, FLOATS, assert_same_bits, randn, run_on
from torch import Tensor
from torch_attention import torch_attention

from smoothquant_ext import ops, reference
from smoothquant_ext.scheme import QMAX

Results = list[Tensor]


# --- arguments, the fewest that an op takes first, all of them last -----------------------------------------------


def quantize_per_token(p: Problem) -> Iterator[Arguments]:
    yield {"x": p.x(), "dtype": p.eight_bit}
    yield {"x": p.x(), "dtype": p.eight_bit, "smooth": positive(p.k)}


def quantize_static(p: Problem) -> Iterator[Arguments]:
    yield {"x": p.x(), "scale": SCALE, "dtype": p.eight_bit}


def rms_norm(p: Problem) -> Iterator[Arguments]:
    yield {"x": p.x(), "weight": randn(p.k, seed=1, dtype=p.dtype), "eps": 1e-5}
    yield {"x": p.x(), "weight": randn(p.k, seed=1), "eps": 1e-5, "offset": 1.0}


def rms_norm_quantize(p: Problem) -> Iterator[Arguments]:
    fewest, more = (each | {"dtype": p.eight_bit} for each in rms_norm(p))
    yield fewest
    yield fewest | {"residual": p.x(seed=2)}
    yield more | {"scale": SCALE}
    yield more | {"residual": p.x(seed=2), "scale": SCALE}


def layer_norm_quantize(p: Problem) -> Iterator[Arguments]:
    fewest = {"x": p.x(), "weight": randn(p.k, seed=1, dtype=p.dtype), "bias": None, "eps": 1e-5, "dtype": p.eight_bit}
    more = fewest | {"weight": randn(p.k, seed=1), "bias": randn(p.k, seed=2, dtype=torch.float16)}
    yield fewest
    yield more
    yield fewest | {"residual": p.x(seed=3)}
    yield more | {"residual": p.x(seed=3), "scale": SCALE}


def activation(names: tuple[str, ...], approximates: bool, p: Problem) -> Iterator[Arguments]:
    fewest = {name: p.x(seed) for seed, name in enumerate(names)} | {"dtype": p.eight_bit}
    yield fewest
    if approximates:
        yield fewest | {"approximate": "tanh"}
    yield fewest | {"scale": SCALE} | ({"approximate": "tanh"} if approximates else {})


def prepack_weight(p: Problem) -> Iterator[Arguments]:
    yield {"weight": p.weight(p.n, p.k)[0]}
    yield {"weight": p.weight(3, p.n, p.k)[0]}


def w8a8_gemm(p: Problem) -> Iterator[Arguments]:
    a, a_scale = reference.quantize_per_token(p.x(), p.eight_bit)
    b, b_scale = p.weight(p.n, p.k)
    yield {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale}
    one = SCALE * 127 / QMAX[p.eight_bit]  # products of the largest e5m2 overflow fp16
    yield {"a": a, "b": b, "a_scale": one, "b_scale": one, "bias": randn(p.n), "out_dtype": p.dtype}
    more = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale[:, None], "bias": randn(p.n, dtype=torch.bfloat16)}
    yield more | {"b": p.packed(b), "out_dtype": p.dtype}


def w8a8_linear(p: Problem) -> Iterator[Arguments]:
    weight, scale = p.weight(p.n, p.k)
    fewest = {"x": p.x(), "weight": weight, "weight_scale": scale}
    more = fewest | {"bias": randn(p.n, dtype=p.dtype), "smooth": positive(p.k)}
    yield fewest
    yield more | {"weight": p.packed(weight), "out_dtype": torch.float16}
    yield more | {"input_scale": SCALE, "out_dtype": torch.bfloat16}


def w8a8_linear_group(p: Problem) -> Iterator[Arguments]:
    widths = p.n, p.n + 60, 3, 5
    fewest = {"x": p.x()} | p.weights(*((n, p.k) for n in widths))
    yield fewest
    yield fewest | {"bias": mixed(*widths), "input_scale": SCALE, "out_dtype": torch.bfloat16}


def w8a8_mlp(p: Problem) -> Iterator[Arguments]:
    plain = p.weights((p.inner, p.k), (p.n, p.inner))
    gated = p.weights((p.inner, p.k), (p.inner, p.k), (p.n, p.inner))
    yield {"x": p.x()} | plain
    yield {"x": p.x()} | gated | {"input_scale": [None, SCALE]}
    biases = mixed(p.inner, p.inner, p.n)
    yield {"x": p.x()} | gated | {"bias": biases, "input_scale": [SCALE, SCALE], "activation": "gelu"}


def w8a8_experts(p: Problem) -> Iterator[Arguments]:
    experts, slots = 3, 2
    index = torch.arange(p.tokens * slots).reshape(*p.leading, slots) * 7 % (experts + 1)  # E is none of them
    routing = {"top_k_index": index, "top_k_weights": randn(*p.leading, slots, seed=4, dtype=p.dtype)}
    fewest = {"x": p.x()} | routing
    yield fewest | p.weights((experts, p.inner, p.k), (experts, p.n, p.inner))
    shapes = (experts, p.inner, p.k), (experts, p.inner, p.k), (experts, p.n, p.inner)
    biases = [randn(*shape[:2], seed=i) if i != 1 else None for i, shape in enumerate(shapes)]
    yield fewest | p.weights(*shapes) | {"bias": biases, "activation": "gelu_tanh"}


def w8a8_decoder_layer_(p: Problem) -> Iterator[Arguments]:
    batch, time = p.leading[0] if p.leading else 1, torch.Size(p.leading[1:]).numel()
    d, heads, kv_heads, past = p.d, p.attended // p.d, 2, 5
    shapes = [(heads * d, p.k), *[(kv_heads * d, p.k)] * 2, (p.k, heads * d), *[(p.inner, p.k)] * 2, (p.k, p.inner)]
    angles = randn(1, time, d, seed=20)
    cache = randn(2, batch, kv_heads, past + time + 5, d, seed=21, dtype=p.dtype)
    fewest = {
        "x": randn(batch, time, p.k, dtype=p.dtype),
        "norm": randn(p.k, seed=22, dtype=p.dtype),
        "post_norm": randn(p.k, seed=23),
        "eps": 1e-5,
        "post_eps": 1e-6,
        "offset": 1.0,
        **p.weights(*shapes),
        "bias": None,
        "input_scale": None,
        "cos": angles.cos().to(p.dtype),
        "sin": angles.sin().to(p.dtype),
        "keys": cache[0],
        "values": cache[1],
        "past": past,
        "mask": None,
        "scale": 0.3,
        "causal": True,
    }
    yield fewest
    (keys, keys_scale), (values, values_scale) = (reference.quantize_per_token(each, torch.int8) for each in cache)
    int8_cache = {"keys": keys, "values": values, "keys_scale": keys_scale, "values_scale": values_scale}
    yield fewest | int8_cache | {"bias": mixed(*(n for n, _ in shapes)), "input_scale": [None, SCALE, None, SCALE]}
    head_norms = {"q_norm": randn(d, seed=24, dtype=p.dtype), "k_norm": randn(d, seed=25), "head_eps": 1e-3}
    mask = randn(batch, 1, time, past + time, seed=26) > -0.5
    static = {"input_scale": [SCALE] * 4, "causal": False, "mask": mask, "activation": "relu"}
    yield fewest | int8_cache | static | head_norms
    room = past + time + 5
    mask = randn(batch, 1, time, room, seed=27) > -0.5
    mask[..., past] = True  # a query that sees nothing is another story
    positions = torch.arange(past, past + time)
    yield fewest | int8_cache | static | head_norms | {"mask": mask, "causal": True, "past": 0, "positions": positions}


def linear(p: Problem) -> Iterator[Arguments]:
    fewest = {"x": p.x(), "weight": randn(p.n, p.k, seed=1, dtype=p.dtype)}
    yield fewest
    yield fewest | {"bias": randn(p.n, seed=2, dtype=p.dtype)}


def attention(p: Problem) -> Iterator[Arguments]:
    batch, time = p.leading[0] if p.leading else 1, torch.Size(p.leading[1:]).numel()
    d, heads, kv_heads, total = min(p.k, 130), 4, 2, time + 5
    q = randn(batch, heads, time, d, dtype=p.dtype)
    k, v = (randn(batch, kv_heads, total, width, seed=width, dtype=p.dtype) for width in (d, p.n))
    mask = randn(batch, 1, time, total, seed=3) > -0.5
    yield {"q": q, "k": k, "v": v, "scale": 0.25}
    yield {"q": q, "k": k, "v": v, "mask": mask, "scale": 0.25, "causal": True}
    (k, k_scale), (v, v_scale) = (reference.quantize_per_token(each, torch.int8) for each in (k, v))
    yield {"q": q, "k": k, "v": v, "mask": mask, "scale": 0.25, "causal": True, "k_scale": k_scale, "v_scale": v_scale}


# --- the table ------------------------------------------------------------------------------------------------------


def same_bits(actual: Results, expected: Results, arguments: Arguments, what: object) -> None:
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other, what)


def product_is_close(actual: Results, expected: Results, arguments: Arguments, what: object) -> None:
    """INT8 has the oracle's bits; FP8 sums have no order."""
    if arguments["a"].dtype == torch.int8:
        same_bits(actual, expected, arguments, what)
        return
    a, b, bias = arguments["a"], arguments["b"], arguments.get("bias")
    b = ops.unpack_weight(b, arguments["b_scale"].numel(), a.shape[-1]) if b.dim() == 4 else b
    y, k = actual[0], a.shape[-1]
    assert [(one.shape, one.dtype) for one in actual] == [(one.shape, one.dtype) for one in expected], what
    if y.numel():
        scales = arguments["a_scale"], arguments["b_scale"]
        check_gemm(y.reshape(-1, y.shape[-1]), a.reshape(-1, k), b, *scales, bias, what)


def experts_are_close(actual: Results, expected: Results, arguments: Arguments, what: object) -> None:
    """INT8 has the oracle's bits; in FP8 each device's products have an order of their own."""
    if arguments["weight"][0].dtype == torch.int8:
        same_bits(actual, expected, arguments, what)
        return
    packed, (n, k) = arguments["weight"], (actual[0].shape[-1], arguments["x"].shape[-1])
    inner = arguments["weight_scale"][0].numel() // len(packed[0])
    sizes = [*[(inner, k)] * (len(packed) - 1), (n, inner)]
    plain = [
        torch.stack([ops.unpack_weight(one, *size).view(torch.int8) for one in each]).view(each.dtype)
        if each.dim() == 5
        else each
        for each, size in zip(packed, sizes, strict=True)
    ]
    check_experts(actual[0], expected[0], arguments | {"weight": plain})


def linear_is_close(actual: Results, expected: Results, arguments: Arguments, what: object) -> None:
    check_linear(actual[0], expected[0], **arguments)


def attention_is_close(actual: Results, expected: Results, arguments: Arguments, what: object) -> None:
    check_attention(actual[0], expected[0], arguments)


class OpCase(NamedTuple):
    """An op: its oracle is the function of this name in ``reference``."""

    name: str
    make: Callable[[Problem], Iterator[Arguments]]
    """Arguments by name for a problem, the fewest that the op takes first, all of them last."""
    rows: tuple[str, ...] = ()
    """Arguments whose rows [..., K] a result [..., N] or [...] depends on row by row."""
    check: Callable[[Results, Results, Arguments, object], None] = same_bits
    """Compares results with the oracle's."""
    floats: tuple[torch.dtype, ...] = FLOATS
    """What ``Problem.dtype`` may be."""
    eight_bit: tuple[torch.dtype, ...] = EIGHT_BIT
    """What ``Problem.eight_bit`` may be; one where it does not matter."""
    contiguous: tuple[str, ...] = ()
    """Arguments that have to be contiguous."""

    @property
    def op(self) -> Callable[..., Any]:
        op: Callable[..., Any] = getattr(ops, self.name)
        return op

    def problems(self, *shape: Any, packs: bool = True) -> Iterator[Problem]:
        """The problems of one shape (``leading``, ``k`` and ``n`` of ``Problem``) in every dtype."""
        for dtype in self.floats:
            for eight_bit in self.eight_bit:
                yield replace(Problem(*shape), dtype=dtype, eight_bit=eight_bit, packs=packs)


NO_8_BIT = EIGHT_BIT[:1]

CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        OpCase("quantize_per_token", rotating(quantize_per_token), rows=("x",)),
        OpCase("quantize_static", rotating(quantize_static), rows=("x",)),
        OpCase("rms_norm_quantize", rms_norm_quantize, rows=("x", "residual")),
        OpCase("layer_norm_quantize", layer_norm_quantize, rows=("x", "residual")),
        OpCase("silu_mul_quantize", rotating(partial(activation, ("gate", "up"), False)), rows=("gate", "up")),
        OpCase("gelu_mul_quantize", rotating(partial(activation, ("gate", "up"), True)), rows=("gate", "up")),
        OpCase("gelu_quantize", rotating(partial(activation, ("x",), True)), rows=("x",)),
        OpCase("relu_quantize", rotating(partial(activation, ("x",), False)), rows=("x",)),
        OpCase("prepack_weight", prepack_weight, floats=FLOATS[:1]),
        OpCase("w8a8_gemm", w8a8_gemm, check=product_is_close),
        OpCase("w8a8_linear", rotating(w8a8_linear), rows=("x",)),
        OpCase("w8a8_linear_group", rotating(w8a8_linear_group), rows=("x",)),
        OpCase("w8a8_mlp", rotating(w8a8_mlp, "k", "inner"), rows=("x",)),
        OpCase(
            "w8a8_experts",
            rotating(w8a8_experts, "k", "inner"),
            rows=("x", "top_k_index", "top_k_weights"),
            check=experts_are_close,
        ),
        OpCase(
            "w8a8_decoder_layer_",
            rotating(w8a8_decoder_layer_, "k", "attended", "k", "inner"),
            contiguous=("keys", "values", "keys_scale", "values_scale"),
        ),
        OpCase("rms_norm", rms_norm, rows=("x",), eight_bit=NO_8_BIT),
        OpCase("linear", linear, rows=("x",), check=linear_is_close, floats=FLOATS[1:2], eight_bit=NO_8_BIT),
        OpCase("attention", attention, check=attention_is_close, eight_bit=NO_8_BIT),
    )
}


def public_ops() -> set[str]:
    """The ops that are registered, without the questions about kernels."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sq::"))
    return {name for _, _, name in (name.partition("::") for name in names) if not name.startswith(("_", "cpu_"))}


# --- calls ----------------------------------------------------------------------------------------------------------


def copied(value: Any) -> Any:
    """A tensor, or what is in a list, copied; anything else as it is."""
    if isinstance(value, list):
        return [copied(each) for each in value]
    return value.clone() if isinstance(value, Tensor) else value


def flat(values: Any) -> Results:
    """The tensors of an op's results, or of its arguments, in a list."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for each in values for tensor in flat(each)] if isinstance(values, list | tuple) else []


def call(op: Callable[..., Any], arguments: Arguments, device: str = "cpu") -> Results:
    """What an op returns, and its arguments after the call: some ops write into them, and the others must not."""
    own = {name: copied(value) for name, value in arguments.items()}
    if device != "cpu":
        return flat(run_on(device, lambda **moved: [op(**moved), list(moved.values())], **own))
    results = op(**own)
    return flat(results) + flat(list(own.values()))


def expected_of(
    case: OpCase, arguments: Arguments, device: str = "cpu", attend: Callable[..., Tensor] | None = None
) -> Results:
    """What the oracle returns, likewise.

    Sums whose order is not defined, those of attention and of FP8 products inside other ops, are taken as on the
    device: attention on a GPU by torch, unless ``attend`` is another one.
    """
    attend = attend or (ops.attention if device == "cpu" else torch_attention)
    kernels = {"attention": attend, "w8a8_gemm": ops.w8a8_gemm}
    dtypes = {tensor.dtype for tensor in flat(list(arguments.values()))}
    sums = {"attention": "decoder_layer"} | ({} if dtypes.isdisjoint(EIGHT_BIT[1:]) else {"w8a8_gemm": "gemm"})
    with ExitStack() as stack:
        for name, module in sums.items():
            if name != case.name:
                ours = partial(run_on, device, kernels[name])
                stack.enter_context(patch(f"smoothquant_ext.reference.{module}.{name}", ours))
        return call(getattr(reference, case.name), arguments)
