"""Rounding of weights: GPTQ against the textbook's algorithm, and the objectives that each method is there for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoothquant_ext.quantization.convert import quantize_weight
from smoothquant_ext.quantization.recipe import ROUNDINGS
from smoothquant_ext.quantization.rounding import CLIP_RATIOS, DAMPING, clipped_scale, gptq, nearest_step, round_weight
from smoothquant_ext.scheme import QMAX, SCHEMES, Scheme, scheme_of

DTYPES = list(QMAX)
ALL = [scheme_of(dtype, weight, "token") for dtype in DTYPES for weight in ("channel", "tensor")]
SHAPES = [(1, 1), (1, 40), (5, 1), (7, 40), (3, 129), (2, 300)]


def correlated(tokens: int, k: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Inputs [tokens, K] whose channels have a few causes in common, and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, rank or max(1, k // 4), generator=generator)
    x = causes @ torch.randn(causes.shape[1], k, generator=generator)
    noise = 0.0 if rank else 0.1
    return (x + noise * torch.randn(tokens, k, generator=generator)) * torch.logspace(-1, 1, k)


def weights(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, n)[:, None]


def loss(weight: Tensor, rounded: tuple[Tensor, Tensor], hessian: Tensor) -> Tensor:
    """fp64 [N]: squared error of each output over the inputs behind the Hessian."""
    error = weight.double() - rounded[0].double() * rounded[1].double()
    return ((error @ hessian.double()) * error).sum(1)


def textbook(steps: Tensor, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """Optimal brain quantization in a fixed order: after each column the inverse Hessian loses a row, explicitly."""
    w, k = steps.double().clone(), len(hessian)
    damped = hessian.double() + DAMPING * float(hessian.diagonal().mean()) * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    result = torch.zeros_like(w)
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        result[:, column] = nearest_step(w[:, column], dtype)
        w -= torch.outer((w[:, column] - result[:, column]) / inverse[column, column], inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rank", [None, 3], ids=["full", "deficient"])
def test_gptq_is_the_textbooks_algorithm(dtype: torch.dtype, n: int, k: int, rank: int | None) -> None:
    x = correlated(2 * k, k, rank).double()
    hessian = x.T @ x
    steps = weights(n, k).double()
    steps *= QMAX[dtype] / steps.abs().amax(1, keepdim=True)
    assert torch.equal(gptq(steps, hessian, dtype), textbook(steps, hessian, dtype))


def test_gptq_leaves_its_arguments_alone() -> None:
    x = correlated(80, 40)
    hessian, steps = x.T @ x, weights(7, 40)
    before = hessian.clone(), steps.clone()
    gptq(steps, hessian, torch.int8)
    assert torch.equal(hessian, before[0])
    assert torch.equal(steps, before[1])


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("rank", [None, 5], ids=["full", "deficient"])
def test_gptq_makes_up_for_errors(scheme: Scheme, rank: int | None) -> None:
    """In the exact objective tr((W - Q) H (W - Q)^T); per channel in that of every single one."""
    x, weight = correlated(400, 150, rank), weights(6, 150)
    hessian = x.T @ x
    nearest, clipped, made_up = (loss(weight, round_weight(weight, scheme, m, hessian), hessian) for m in ROUNDINGS)
    assert float(made_up.sum()) < float(torch.minimum(nearest.sum(), clipped.sum()))
    if scheme.weight == "channel":
        assert bool((made_up < nearest).all())


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_without_correlation_there_is_nothing_to_make_up_for(scheme: Scheme) -> None:
    weight, hessian = weights(7, 140), torch.rand(140).square().diag()
    for a, b in zip(*(round_weight(weight, scheme, m, hessian) for m in ("clip", "gptq")), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_clipped_scale_is_the_best_of_its_candidates(scheme: Scheme, n: int, k: int) -> None:
    weight, importance = weights(n, k), torch.rand(k, generator=torch.Generator().manual_seed(2)).square()

    def errors(scale: Tensor) -> Tensor:
        error = ((nearest_step(weight / scale, scheme.dtype) * scale - weight).square() * importance).sum(1)
        return error if scheme.weight == "channel" else error.sum()[None]

    absmax = weight.abs().amax(1, keepdim=True) if scheme.weight == "channel" else weight.abs().max()[None]
    candidates = [absmax / QMAX[scheme.dtype] * ratio for ratio in CLIP_RATIOS]
    found = clipped_scale(weight, importance, scheme)
    assert found.shape == absmax.shape
    assert torch.equal(errors(found), torch.stack([errors(scale) for scale in candidates]).amin(0))


def test_clipping_happens_where_an_unimportant_weight_is_large() -> None:
    weight = torch.full((2, 64), 0.51)
    weight[:, 0] = torch.tensor([1.0, 0.51])
    importance = torch.ones(64)
    importance[0] = 1e-9
    scale = clipped_scale(weight, importance, SCHEMES["int8"])
    assert float(scale[0]) < 1 / 127
    assert float(clipped_scale(weight, torch.ones(64), SCHEMES["int8"])[0]) == pytest.approx(1 / 127)


@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_form(scheme: Scheme, method: str, dtype: torch.dtype) -> None:
    """Shapes and dtypes, values in range, and what is dead stays dead."""
    x = correlated(60, 72)
    x[:, 5] = 0
    weight = weights(9, 72).to(dtype)
    weight[3] = 0
    quantized, scale = round_weight(weight, scheme, method, x.T @ x)
    assert quantized.dtype == scheme.dtype
    assert scale.dtype == torch.float32
    assert quantized.shape == weight.shape
    assert scale.shape == ((9, 1) if scheme.weight == "channel" else (1,))
    assert float(quantized.float().abs().max()) <= QMAX[scheme.dtype]
    assert not quantized[3].float().any()
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())


@pytest.mark.parametrize("method", ROUNDINGS)
def test_without_inputs_it_is_rounding_to_nearest(method: str) -> None:
    for scheme in ALL:
        found, expected = round_weight(weights(4, 33), scheme, method, None), quantize_weight(weights(4, 33), scheme)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, expected, strict=True))


DEGENERATE = {
    "no input at all": torch.zeros(50, 24),
    "one token": correlated(1, 24),
    "all channels the same": torch.ones(50, 24),
    "one massive channel": torch.ones(50, 24).index_fill(1, torch.tensor([3]), 1e6),
    "tiny": correlated(50, 24) * 1e-18,
    "huge": correlated(50, 24) * 1e16,
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_degenerate_hessians(kind: str, dtype: torch.dtype) -> None:
    """The result is in the weights' range, and no worse than rounding to nearest by more than fp32's rounding."""
    x, weight, scheme = DEGENERATE[kind], weights(5, 24), scheme_of(dtype, "channel", "token")
    hessian = x.T @ x
    result = round_weight(weight, scheme, "gptq", hessian)
    assert bool(torch.isfinite(result[0].float()).all())
    before, after = (loss(weight, rounded, hessian) for rounded in (quantize_weight(weight, scheme), result))
    size = ((weight.double() @ hessian.double()) * weight.double()).sum(1).abs()
    assert bool((after <= before + torch.finfo(torch.float32).eps * size).all())


@pytest.mark.parametrize("factor", [1e18, 1e19, 1e30])
def test_a_hessian_that_overflows_tells_nothing(factor: float) -> None:
    x, weight, scheme = correlated(50, 24) * factor, weights(5, 24), SCHEMES["int8"]
    assert not torch.isfinite(2 * (x.T @ x).diagonal().sum())
    found, expected = round_weight(weight, scheme, "gptq", x.T @ x), quantize_weight(weight, scheme)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-38, 1e38])
def test_rows_near_the_ends_of_the_range(method: str, dtype: torch.dtype, size: float) -> None:
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    weight[1] = weight[1] / weight[1].abs().max() * size
    x = correlated(50, 24)
    quantized, scale = round_weight(weight, scheme_of(dtype, "channel", "token"), method, x.T @ x)
    value = quantized.float() * scale
    assert bool(torch.isfinite(value).all())
    assert float(value[1].abs().max()) <= 2 * size  # little precision is left for subnormal numbers
    assert not torch.allclose(value[0], torch.zeros(24))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest_step_is_the_nearest(dtype: torch.dtype) -> None:
    grid = torch.arange(-127, 128).float() if dtype == torch.int8 else torch.arange(256).byte().view(dtype).float()
    grid = grid[torch.isfinite(grid)].unique()
    x = torch.cat([torch.randn(500), torch.randn(500) * QMAX[dtype], grid])
    found = nearest_step(x, dtype)
    assert torch.equal((found - x).abs(), (grid - x[:, None]).abs().amin(1))
    assert bool(torch.isin(found, grid).all())
