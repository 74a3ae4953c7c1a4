"""Quantization, norms and activations through torch alone: bit for bit, or within derived bounds of the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_testing import EIGHT_BIT, FLOATS, assert_same_bits, randn
from torch import Tensor
from torch_rules import CudaRules

from smoothquant_ext import ops, reference
from smoothquant_ext.ops.cuda import fallback_quantize as by_torch
from smoothquant_ext.scheme import QMAX

EPS = torch.finfo(torch.float32).eps
SCALE = torch.tensor([0.03])

# --- quantization, bit for bit --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    k=st.integers(0, 70),
    exponent=st.integers(-149, 127),
    seed=st.integers(0, 999),
    dtype=st.sampled_from(FLOATS),
    eight_bit=st.sampled_from(EIGHT_BIT),
    is_smooth=st.booleans(),
)
def test_any_tensor_is_quantized_bit_for_bit(
    rows: int, k: int, exponent: int, seed: int, dtype: torch.dtype, eight_bit: torch.dtype, is_smooth: bool
) -> None:
    """Of every magnitude, subnormal and overflowing ones included."""
    x = (randn(rows, k, seed=seed) * 2.0**exponent).to(dtype)
    smooth = randn(k, seed=1).abs() + 0.2 if is_smooth else None
    for actual, expected in zip(
        by_torch.quantize_per_token(x, eight_bit, smooth),
        reference.quantize_per_token(x, eight_bit, smooth),
        strict=True,
    ):
        assert_same_bits(actual, expected)
    for scale in (SCALE, torch.tensor(2.0**-126), torch.tensor([1e-45]), torch.tensor([[3e38]])):
        assert_same_bits(by_torch.quantize_static(x, scale, eight_bit), reference.quantize_static(x, scale, eight_bit))


@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_16_bit_pattern_is_quantized_bit_for_bit(dtype: torch.dtype, eight_bit: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = bits.to(torch.int16).view(dtype) if dtype != torch.float32 else (bits << 16).view(dtype)
    with CudaRules(90):
        q = by_torch.quantize_static(x, SCALE, eight_bit)
    assert_same_bits(q, reference.quantize_static(x, SCALE, eight_bit))
    every = x[torch.isfinite(x)]
    finite = torch.stack([every, every.flip(0), every.roll(7)], dim=1)
    for rows in (finite, x[:, None], torch.stack([x, x.roll(1)], dim=1)):
        for actual, expected in zip(
            by_torch.quantize_per_token(rows, eight_bit), reference.quantize_per_token(rows, eight_bit), strict=True
        ):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("qmax", QMAX.values())
def test_a_ratio_is_the_nearest_fp32(qmax: float) -> None:
    """Also where a processor divides by multiplying with a reciprocal of 1 ulp, if it does so in fp64."""
    bits = torch.randint(0, 0x7F800000, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x, q = bits.view(torch.float32), torch.tensor(qmax)
    exact = x / q
    assert torch.equal(by_torch.ratio(x, q), exact)
    assert torch.equal(by_torch.ratio(q, x), q / x)
    assert torch.equal((x.double() * (1 / q.double())).float(), exact)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["per token", "static"])
@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
def test_what_ops_quantize_inside(eight_bit: torch.dtype, scale: Tensor | None) -> None:
    x = randn(7, 70)
    x[1, 3], x[2, 4], x[3], x[4] = torch.nan, torch.inf, 0.0, -0.0
    x[5] *= 1e-42
    smooth = randn(70, seed=1).abs() + 0.2
    for own in (None, smooth):
        for actual, expected in zip(
            by_torch.quantize_rows(x, eight_bit, scale, own),
            reference.quantize.quantize_with(x, eight_bit, scale, own),
            strict=True,
        ):
            assert_same_bits(actual, expected)


# --- what is computed before it is quantized ------------------------------------------------------------------------

# Half the distance of neighbours: relative to a normal value, and of subnormal ones; 0 and 1/2 for integers.
HALF_STEP = {torch.int8: (0.0, 0.5), torch.float8_e4m3fn: (2.0**-4, 2.0**-10), torch.float8_e5m2: (2.0**-3, 2.0**-17)}


def check_quantized(actual: Any, expected: Any, error: Tensor, what: object) -> None:
    """``q * scale`` of both is within half a step of values that differ from the exact ones by ``error`` at most.

    fp64 [..., K], of rows that are not finite anything. A scale is the absmax / qmax, rounded once; a value times the
    multiplier, which is rounded too, rounds once more: 2 eps of q * scale.
    """
    (q, scale, *rest), (oracle_q, oracle_scale, *oracle_rest) = actual, expected
    assert (q.dtype, q.shape, scale.shape) == (oracle_q.dtype, oracle_q.shape, oracle_scale.shape), what
    assert torch.equal(scale.isnan(), oracle_scale.isnan()), what
    assert not q.float()[scale.isnan()].any(), what
    for one, other in zip(rest, oracle_rest, strict=True):
        assert_same_bits(one, other, what)
    if q.numel() == 0:
        return
    relative, least = HALF_STEP[q.dtype]
    values, bound = [], 2 * error
    for own_q, own_scale in ((q, scale), (oracle_q, oracle_scale)):
        step = own_scale.double().unsqueeze(-1)
        magnitude = own_q.double().abs()
        values.append(own_q.double() * step)
        bound = bound + (relative * magnitude).clamp(min=least) * step + 2 * EPS * magnitude * step
    is_finite = ~scale.isnan()
    assert bool(((values[0] - values[1]).abs() <= bound)[is_finite].all()), what
    largest = (2 * error / QMAX[q.dtype]).amax(-1) + EPS * scale.double()
    assert bool(((scale.double() - oracle_scale.double()).abs() <= largest)[is_finite].all()), what
    if q.dtype == torch.int8:
        assert int((q.int() - oracle_q.int()).abs().amax()) <= 1, what


def rms_error(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What fp32 may be off by, fp64 [..., K].

    With u = EPS / 2: K squares and their sum in any order err by K u, the division and the sum with ``eps`` by 2 u,
    half of which remains after the root; the reciprocal root by 2 EPS; two products by 2 u.
    """
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps) * weight.double()
    return exact.abs() * (x.shape[-1] / 4 + 4) * EPS


def layer_error(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Likewise. The mean is off by at most d = K u mean|x|, which moves deviations by d and their variance by d^2."""
    wide = x.double()
    d = wide.shape[-1] * EPS / 2 * wide.abs().mean(-1, keepdim=True)
    deviations = wide - wide.mean(-1, keepdim=True)
    variance = deviations.square().mean(-1, keepdim=True) + eps
    gain = torch.rsqrt(variance)
    relative = (x.shape[-1] / 4 + 5) * EPS + d.square() / variance
    error = ((deviations.abs() + d) * relative + d) * gain * weight.double().abs()
    added = 0.0 if bias is None else bias.double().abs()
    return error + EPS * ((deviations * gain * weight.double()).abs() + added)


NORM_SHAPES = [(0, 8), (1, 1), (3, 15), (5, 64), (2, 3, 100), (4, 4097)]


@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_are_within_the_bound(dtype: torch.dtype, eight_bit: torch.dtype) -> None:
    for shape in NORM_SHAPES:
        x, residual = (randn(*shape, seed=seed, dtype=dtype) * 3 + seed for seed in (1, 2))
        w, bias = randn(shape[-1], seed=3), randn(shape[-1], seed=4, dtype=torch.float16)
        for own, scale in ((None, None), (residual, None), (None, SCALE), (residual, SCALE)):
            total = x if own is None else x + own
            arguments = (x, w, 1e-5, eight_bit, own, scale, 1.0)
            error = rms_error(total, w + 1, 1e-5)
            check_quantized(
                by_torch.rms_norm_quantize(*arguments), reference.rms_norm_quantize(*arguments), error, shape
            )
            for shift in (None, bias):
                layer = (x, w, shift, 1e-5, eight_bit, own, scale)
                check_quantized(
                    by_torch.layer_norm_quantize(*layer),
                    reference.layer_norm_quantize(*layer),
                    layer_error(total, w, shift, 1e-5),
                    shape,
                )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_is_accurate(dtype: torch.dtype) -> None:
    for shape in NORM_SHAPES:
        for offset in (0.0, 1.0):
            x, w = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype, seed=1)
            y = by_torch.rms_norm(x, w, 1e-5, offset)
            wide = w.float() + offset
            exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5) * wide.double()
            bound = 1.01 * rms_error(x, wide, 1e-5) + torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert bool(((y.double() - exact).abs() <= bound).all()), (shape, offset)


def test_rms_norm_of_strange_rows() -> None:
    x = randn(6, 70)
    x[1], x[2, 3], x[3, 4], x[4] = 0.0, torch.nan, torch.inf, 1e30  # whose squares overflow: no gain is left
    y, expected = by_torch.rms_norm(x, torch.ones(70), 1e-6), reference.rms_norm(x, torch.ones(70), 1e-6)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_same_bits(y[[1, 4]], expected[[1, 4]])


# The oracle's exponential saturates at e^60, so that what lies between 100 e^-60 and 0 is not exact.
SATURATED = 100 * 2.0**-86
# Errors of torch's functions and of the oracle's, in EPS of |x|. silu: exponential 2, sum, quotient. gelu: the oracle's
# fit 1.2e-7 of a tail of at most 1/2, 16 roundings of it and z^2 in its exponent, torch's 1 + erf. gelu_tanh: the
# argument's 4 roundings times at most 1/4 of it, tanh or exponential 2, sum, products.
ACTIVATION_ERROR = {"silu": 4, "gelu": 12, "gelu_tanh": 8, "relu": 0}
GRID = torch.linspace(-100, 100, 40_001)


@pytest.mark.parametrize("name", ACTIVATION_ERROR)
def test_activations_are_accurate(name: str) -> None:
    x = GRID.double()
    inner = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    exact = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * torch.special.erfc(-x * 0.5**0.5),
        "gelu_tanh": x / (1 + torch.exp(-inner)),
        "relu": x.clamp(min=0),
    }[name]
    bound = ACTIVATION_ERROR[name] * EPS * x.abs() + SATURATED
    for values in (by_torch.activate(name, GRID), reference.ACTIVATIONS[name](GRID)):
        assert bool(((values.double() - exact).abs() <= bound).all())
    assert torch.equal(by_torch.activate(name, GRID, GRID), by_torch.activate(name, GRID) * GRID)


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("eight_bit", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations_are_within_the_bound(dtype: torch.dtype, eight_bit: torch.dtype) -> None:
    for shape in NORM_SHAPES:
        gate, up = randn(*shape, dtype=dtype) * 3, randn(*shape, seed=1, dtype=dtype)
        if len(gate) > 2:
            gate[1, 0], gate[2, -1] = torch.nan, -torch.inf
        for scale in (None, SCALE):
            for name, op, arguments in (
                ("silu", "silu_mul_quantize", {"up": up}),
                ("gelu", "gelu_mul_quantize", {"up": up}),
                ("gelu_tanh", "gelu_mul_quantize", {"up": up, "approximate": "tanh"}),
                ("gelu", "gelu_quantize", {}),
                ("gelu_tanh", "gelu_quantize", {"approximate": "tanh"}),
                ("relu", "relu_quantize", {}),
            ):
                first = {"gate" if "up" in arguments else "x": gate}
                given = first | {"dtype": eight_bit, "scale": scale} | arguments
                factor = up.double().abs() if "up" in arguments else torch.ones(())
                error = (ACTIVATION_ERROR[name] + 1) * EPS * gate.double().abs() + SATURATED
                check_quantized(
                    getattr(ops, op)(**given), getattr(reference, op)(**given), error * factor, (op, shape, given)
                )
