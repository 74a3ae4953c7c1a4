"""The ops between the products: norms, activations and linear. Bit for bit against the oracle: test_every_op.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_bounds import check_linear
from op_testing import FLOATS, ISAS, Call, Run, assert_same_bits, cpu_isa
from torch import Tensor

from smoothquant_ext import ops, reference

EPS = torch.finfo(torch.float32).eps
SHAPES = [(0, 8), (1, 1), (3, 15), (2, 16), (5, 17), (7, 64), (33, 577), (2, 3, 100), (4, 4096), (2, 8200)]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_is_accurate(dtype: torch.dtype, run: Run) -> None:
    for shape in SHAPES:
        for offset in (0.0, 1.0):
            x, w = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
            y = run(ops.rms_norm, x, w, 1e-5, offset)
            exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * (w.double() + offset)
            # One rounding to the output's dtype, after fp32 sums of K terms.
            bound = (torch.finfo(dtype).eps + shape[-1] * EPS) * exact.abs() + torch.finfo(dtype).tiny
            assert bool(((y.double() - exact).abs() <= bound).all()), (shape, offset)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 40), k=st.integers(1, 300), seed=st.integers(0, 999), dtype=st.sampled_from(FLOATS))
def test_rms_norm_of_any_shape(rows: int, k: int, seed: int, dtype: torch.dtype) -> None:
    x, w = randn(rows, k, dtype=dtype, seed=seed), randn(k, seed=seed + 1)
    for isa in ISAS:
        with cpu_isa(isa):
            assert same(ops.rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6))


def test_rms_norm_of_strange_rows(run: Run) -> None:
    x = randn(6, 70)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3, 4] = float("inf")
    x[4] = 1e-30
    x[5] = 1e30
    y = run(ops.rms_norm, x, torch.ones(70), 1e-6)
    assert same(y, reference.rms_norm(x, torch.ones(70), 1e-6))
    assert not y[1].any()
    assert y[2].isnan().all()
    assert same(y[0], run(ops.rms_norm, x[:1], torch.ones(70), 1e-6)[0])


# --- norms that quantize --------------------------------------------------------------------------------------------

Result = tuple[Tensor, ...]


def assert_same_results(actual: Result, expected: Result) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 40), k=st.integers(1, 300), seed=st.integers(0, 999), dtype=st.sampled_from(FLOATS))
def test_layer_norm_quantize_of_any_shape(rows: int, k: int, seed: int, dtype: torch.dtype) -> None:
    x, w, bias = randn(rows, k, dtype=dtype, seed=seed), randn(k, seed=seed + 1), randn(k, seed=seed + 2)
    for isa in ISAS:
        with cpu_isa(isa):
            arguments = (x, w, bias, 1e-6, torch.int8, x)
            assert_same_results(ops.layer_norm_quantize(*arguments), reference.layer_norm_quantize(*arguments))


def test_norm_quantize_is_the_norm_of_torch(run: Run) -> None:
    x, residual, w, bias = randn(50, 300), randn(50, 300, seed=1), randn(300, seed=2), randn(300, seed=3)
    x += 5  # a mean that a layer norm has to take away
    exact = torch.nn.functional.layer_norm((x + residual).double(), (300,), w.double(), bias.double(), 1e-5)
    q, scale, total = run(ops.layer_norm_quantize, x, w, bias, 1e-5, torch.int8, residual)
    assert torch.equal(total, x + residual)
    # Half a step of the quantizer, and fp32 sums of 300 terms.
    error = (q.double() * scale.double().unsqueeze(-1) - exact).abs()
    assert bool((error <= 0.5 * scale.double().unsqueeze(-1) + 2 * 300 * EPS * (exact.abs() + 5)).all())


def test_norm_quantize_of_strange_rows_touches_no_other(run: Run) -> None:
    x, w = randn(6, 70), randn(70, seed=1)
    clean = run(ops.rms_norm_quantize, x, w, 1e-6, torch.int8)
    x[1, 3], x[2, 4] = float("nan"), float("inf")
    x[3] = 0
    for a_scale in (None, torch.tensor([0.1])):
        for q, scale, _ in (
            run(ops.rms_norm_quantize, x, w, 1e-6, torch.int8, None, a_scale),
            run(ops.layer_norm_quantize, x, w, None, 1e-6, torch.int8, None, a_scale),
        ):
            assert scale[[1, 2]].isnan().all()
            assert not q[[1, 2, 3]].any()
    q, scale, _ = run(ops.rms_norm_quantize, x, w, 1e-6, torch.int8)
    assert torch.equal(q[[0, 4, 5]], clean[0][[0, 4, 5]])
    assert torch.equal(scale[[0, 4, 5]], clean[1][[0, 4, 5]])


# --- activations ----------------------------------------------------------------------------------------------------

GRID = torch.linspace(-100, 100, 400_001)
# The exponential saturates at e^60, and with it what lies between 100 e^-60 and 0.
SATURATED = 100 * 2.0**-86


def test_silu_is_accurate() -> None:
    exact = GRID.double() / (1 + torch.exp(-GRID.double()))
    # 2 ulp of exp, 1 each of the addition and the division.
    bound = 4 * EPS * exact.abs() + SATURATED
    assert bool(((reference.silu(GRID).double() - exact).abs() <= bound).all())


def test_gelu_is_accurate() -> None:
    x = GRID.double()
    exact = x * 0.5 * torch.special.erfc(-x * 0.5**0.5)  # torch's gelu loses its tail to 1 + erf
    tail = 0.5 * torch.special.erfc(x.abs() * 0.5**0.5)
    # The fit's error and a dozen roundings of its polynomial, which lies in [-2, 1]; z^2, rounded twice, is in an
    # exponent; x * (1 - tail) adds one rounding of the difference and one of the product.
    relative = 1.2e-7 + 16 * EPS + 2 * EPS * x.square() / 2
    bound = x.abs() * (relative * tail) + 2 * EPS * exact.abs() + SATURATED
    assert bool(((reference.gelu(GRID).double() - exact).abs() <= bound).all())


def test_gelu_tanh_is_accurate() -> None:
    x = GRID.double()
    inner = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    exact = x / (1 + torch.exp(-inner))
    # As silu, with four roundings in the argument of the exponential, which counts where the exponential does.
    weight = torch.exp(-inner) / (1 + torch.exp(-inner))
    bound = exact.abs() * (4 * EPS + 4 * EPS * inner.abs().clamp(max=100) * weight.nan_to_num(1.0)) + SATURATED
    assert bool(((reference.gelu_tanh(GRID).double() - exact).abs() <= bound).all())
    torch.testing.assert_close(exact, torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-12)


# name -> (op, oracle), each a function of gate, up, dtype and a_scale
ACTIVATIONS: dict[str, tuple[Callable[..., Result], Callable[..., Result]]] = {
    "silu_mul": (ops.silu_mul_quantize, reference.silu_mul_quantize),
    "gelu_mul": (ops.gelu_mul_quantize, reference.gelu_mul_quantize),
    "gelu_mul, tanh": (
        lambda *arguments: ops.gelu_mul_quantize(*arguments, approximate="tanh"),
        lambda *arguments: reference.gelu_mul_quantize(*arguments, approximate="tanh"),
    ),
    "gelu": (
        lambda gate, _, *rest: ops.gelu_quantize(gate, *rest),
        lambda gate, _, *rest: reference.gelu_quantize(gate, *rest),
    ),
    "gelu, tanh": (
        lambda gate, _, *rest: ops.gelu_quantize(gate, *rest, approximate="tanh"),
        lambda gate, _, *rest: reference.gelu_quantize(gate, *rest, approximate="tanh"),
    ),
    "relu": (
        lambda gate, _, *rest: ops.relu_quantize(gate, *rest),
        lambda gate, _, *rest: reference.relu_quantize(gate, *rest),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_extreme_values_equal_the_oracle(name: str, run: Run) -> None:
    op, oracle = ACTIVATIONS[name]
    values = [0.0, -0.0, 1e-40, -1e-40, 87.5, -87.5, 1e4, -1e4, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
    gate = torch.tensor(values).unsqueeze(1)
    assert_same_results(
        run(op, gate, torch.ones_like(gate), torch.int8), oracle(gate, torch.ones_like(gate), torch.int8)
    )


def test_relu_keeps_what_relu_keeps(run: Run) -> None:
    x = torch.tensor([[-torch.inf, 127.0], [torch.nan, 1.0]])
    q, scale = run(ops.relu_quantize, x, torch.int8)
    assert q[0].tolist() == [0, 127]
    assert scale[0] == 1
    assert scale[1].isnan()


# --- linear ---------------------------------------------------------------------------------------------------------


LINEAR_SHAPES = [(0, 8), (1, 1), (1, 576), (2, 31), (3, 33), (2, 3, 64), (17, 100), (70, 66)]


@pytest.mark.parametrize("n", [0, 1, 3, 4, 32, 70])
def test_linear_is_a_product(n: int, isa: str) -> None:
    for shape in LINEAR_SHAPES:
        x, w = randn(*shape, dtype=torch.bfloat16), randn(n, shape[-1], dtype=torch.bfloat16, seed=1)
        for bias in (None, randn(n, dtype=torch.bfloat16, seed=2)):
            check_linear(ops.linear(x, w, bias), reference.linear(x, w, bias), x, w, bias)


@pytest.mark.parametrize("n", [9, 64])
def test_linear_of_strange_rows_touches_no_other(n: int, isa: str) -> None:
    x, w = randn(5, 70, dtype=torch.bfloat16), randn(n, 70, dtype=torch.bfloat16, seed=1)
    clean = ops.linear(x, w)
    x[3, 69] = float("nan")
    y = ops.linear(x, w)
    assert y[3].isnan().all()
    assert torch.equal(y[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])
    w[6] = float("inf")  # the rest of the row before is read with the beginning of this one
    assert torch.equal(ops.linear(x[:3], w)[:, :6], clean[:3, :6])


# --- errors ---------------------------------------------------------------------------------------------------------

X, W, BF16 = torch.ones(3, 40), torch.ones(40), torch.ones(3, 40, dtype=torch.bfloat16)
ERRORS: list[tuple[Call, str]] = [
    (lambda: ops.rms_norm(X, W[:39], 1e-6), "rms_norm: weight has 39 elements, expected K=40"),
    (lambda: ops.rms_norm(X.double(), W, 1e-6), "rms_norm: x is float64"),
    (lambda: ops.rms_norm(X, W.int(), 1e-6), "rms_norm: weight is int32"),
    (lambda: ops.rms_norm_quantize(X, W, 1e-6, torch.uint8), "rms_norm_quantize: dtype is uint8"),
    (lambda: ops.rms_norm_quantize(X, W, 1e-6, torch.int8, X.half()), "x is float32 and residual is float16"),
    (lambda: ops.rms_norm_quantize(X, W, 1e-6, torch.int8, X[:2]), r"x has shape \[3, 40\] and residual \[2, 40\]"),
    (lambda: ops.rms_norm_quantize(X, W, 1e-6, torch.int8, None, W), "scale has 40 elements, expected 1"),
    (lambda: ops.layer_norm_quantize(X, W, W[:3], 1e-6, torch.int8), "bias has 3 elements, expected K=40"),
    (lambda: ops.layer_norm_quantize(X, W, None, 1e-6, torch.int8, scale=W[:1] * 0), "scale is 0, expected"),
    (lambda: ops.silu_mul_quantize(X, X.half(), torch.int8), "gate is float32 and up is float16"),
    (lambda: ops.silu_mul_quantize(X, X[:2], torch.int8), r"gate has shape \[3, 40\] and up \[2, 40\]"),
    (lambda: ops.silu_mul_quantize(X.int(), X.int(), torch.int8), "silu_mul_quantize: gate is int32"),
    (lambda: ops.gelu_quantize(X, torch.int8, None, "erf"), "approximate is 'erf', expected none or tanh"),
    (lambda: ops.gelu_quantize(X, torch.float32), "gelu_quantize: dtype is float32"),
    (lambda: ops.relu_quantize(W[0], torch.int8), "relu_quantize: x has no dimensions"),
    (lambda: ops.linear(X, BF16), "linear: x is float32, expected bfloat16"),
    (lambda: ops.linear(BF16, BF16[:, :39]), "linear: x has K=40, but weight has K=39"),
    (lambda: ops.linear(BF16, BF16[0]), r"linear: weight has shape \[40\], expected \[N, K\]"),
    (lambda: ops.linear(BF16, BF16, BF16[0]), "linear: bias has 40 elements, expected N=3"),
]


@pytest.mark.parametrize(("call", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_name_the_culprit(call: Call, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        call()
