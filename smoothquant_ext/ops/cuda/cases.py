"""The small set of cases that proves a family of kernels, and what the result of each must be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ... import reference
from ...hadamard import block_size
from ...reference.bounds import gemm_bound
from ...reference.experts_bound import experts_bound, fit_tensor_cores
from .decoder_layer_cases import decoder_layers
from .families import EXPERTS, way_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EIGHT_BIT = (torch.int8, E4M3, E5M2)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

ROWS_AND_COLUMNS = (
    (1, 577, F32, 0),
    (9, 4096, BF16, 0),
    (17, 1000, F16, 0),
    (64, 576, BF16, 16),
    (300, 128, F32, 128),
    (5, 12288, BF16, 0),
    (5, 12288, F32, 256),
    (4, 11776, F16, 128),
    (4, 16384, BF16, 256),
    (2, 33024, F16, 256),
    (0, 64, BF16, 0),
    (6, 1, F32, 0),
)
"""Inputs of the kernels without a product: odd and even, short, and around each limit of shared memory.

The last number is the size of the blocks that are rotated in one more case of each op; 0 for none.
"""

SHAPES = (
    (1, 33, 70),
    (1, 4096, 4096),
    (5, 40, 4096),
    (8, 256, 1024),
    (9, 30, 70),
    (20, 48, 64),
    (17, 48, 528),
    (64, 272, 1040),
    (300, 272, 1040),
    (130, 17, 208),
    (2048, 2048, 64),
)
"""M, N, K: a row and many, what tensor cores take and what they do not, split sums, more tiles than multiprocessors."""

MIXTURES = (
    (1, 8, 64, 576, 96, 130, 0),
    (9, 2, 5, 70, 33, 9, 0),
    (17, 3, 300, 64, 48, 32, 16),
    (64, 2, 16, 1040, 272, 64, 0),
    (64, 2, 16, 100, 60, 36, 0),
    (300, 4, 8, 208, 128, 272, 128),
    (700, 2, 3, 64, 400, 136, 0),
    (0, 2, 4, 64, 32, 16, 0),
    (5, 0, 4, 64, 32, 16, 0),
    (40, 2, 3, 64, 256, 48, 256),
)
"""Tokens, slots, experts, K, inner width, N, and the size of blocks that are rotated or 0.

Few rows an expert and many, sizes of tensor cores and others.
"""

STATIC = 0.02
"""A static scale that saturates some values."""


WRITTEN = ("keys", "values", "keys_scale", "values_scale")
"""Arguments that an op writes to whose name ends in ``_``."""


class Case(NamedTuple):
    """A call of an op."""

    op: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The call as a reader would write it down."""
        parts = (f"{name}={_brief(value)}" for name, value in self.arguments.items() if value is not None)
        return f"{self.op}({', '.join(parts)})"

    def run(self, op: Callable[..., Any], device: str = "cpu") -> list[Tensor]:
        """The results of the op or its oracle, and the arguments that it wrote to, of which it gets copies."""
        arguments = tree_map_only(Tensor, lambda x: x.to(device), self.arguments)
        names = [name for name in WRITTEN if self.op.endswith("_") and name in arguments]
        written = {name: arguments[name].clone() for name in names}
        return [*_flat(op(**arguments | written)), *written.values()]


def cases_of(family: str) -> Iterator[Case]:
    """The cases of a family, the simplest first."""
    product = way_of(family)
    if product is not None:
        yield from (_products if product[1] == "int8" else _fp8_products)()
    elif family == "quantize":
        yield from _quantizing()
    elif family == "norm_activation":
        yield from _norms_and_activations()
    elif family in EXPERTS:
        yield from _experts((torch.int8,) if family == EXPERTS[0] else (E4M3, E5M2))
    elif family == "decoder_layer":
        yield from (Case("w8a8_decoder_layer_", arguments) for arguments in decoder_layers())
    else:
        raise ValueError(f"there is no family {family!r} of kernels")


def difference(case: Case, results: Any, family: str) -> str:
    """What is wrong with the results of a case, or nothing; the arguments that it wrote to follow its results."""
    arguments = case.arguments
    if case.op == "w8a8_gemm" and arguments["a"].dtype != torch.int8:
        return _fp8_difference(arguments, _flat(results)[0].cpu(), on_tensor_cores=not family.startswith("skinny"))
    expected = case.run(getattr(reference, case.op))
    if case.op == "w8a8_experts" and arguments["weight"][0].dtype != torch.int8:
        exact, bound = experts_bound(arguments, fit_tensor_cores(arguments))
        exact = exact.where(~expected[0].isnan(), torch.nan)
        return _difference(_flat(results)[0].cpu(), expected[0], exact, bound)
    pairs = zip(_flat(results), expected, strict=True)
    return next(filter(None, (_bits_difference(each.cpu(), right) for each, right in pairs)), "")


# --- calls ----------------------------------------------------------------------------------------------------------


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _activation(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[rows, columns] with outliers; of more than 3 rows one is zero and two are not finite."""
    x = _randn(rows, columns, seed=seed)
    x[:, ::97] *= 30
    if rows > 3:
        x[1, columns // 2], x[2, -1], x[3] = torch.nan, torch.inf, 0.0
    return x.to(dtype)


def _inputs() -> Iterator[tuple[Tensor, Tensor, torch.dtype, int]]:
    """x, another x, an 8-bit dtype (all of these for one shape, one for the others), and blocks to rotate or 0."""
    for turn, (rows, columns, dtype, rotate) in enumerate(ROWS_AND_COLUMNS):
        x, other = (_activation(rows, columns, dtype, seed) for seed in (0, 1))
        for eight_bit in EIGHT_BIT if turn == 1 else (EIGHT_BIT[turn % 3],):
            yield x, other, eight_bit, rotate


def _quantizing() -> Iterator[Case]:
    for turn, (x, _, dtype, rotate) in enumerate(_inputs()):
        smooth = _randn(x.shape[1], seed=2).abs() + 0.1
        plain, static = {"x": x, "dtype": dtype}, {"x": x, "scale": torch.tensor([STATIC]), "dtype": dtype}
        yield Case("quantize_per_token", plain)
        yield Case("quantize_per_token", plain | {"smooth": smooth})
        yield Case("quantize_static", static)
        if rotate:
            yield Case("quantize_per_token", plain | {"smooth": smooth if turn % 2 else None, "rotate": rotate})
            yield Case("quantize_static", static | {"rotate": rotate})


def _norms_and_activations() -> Iterator[Case]:
    for turn, (x, other, dtype, rotate) in enumerate(_inputs()):
        weight, bias = _randn(x.shape[1], seed=2).to(x.dtype), _randn(x.shape[1], seed=3).to(x.dtype)
        scale = torch.tensor([STATIC]) if turn % 2 else None
        norm = {"x": x, "weight": weight, "eps": 1e-5}
        yield Case("rms_norm", norm | {"offset": float(turn % 2)})
        yield Case("rms_norm_quantize", norm | {"dtype": dtype, "scale": scale})
        yield Case("rms_norm_quantize", norm | {"dtype": dtype, "residual": other, "offset": 1.0})
        yield Case("layer_norm_quantize", norm | {"bias": bias, "dtype": dtype, "residual": other, "scale": scale})
        kinds = [{"approximate": kind} for kind in ("none", "tanh")]
        to: dict[str, Any] = {"dtype": dtype, "scale": scale}
        gated, plain = {"gate": x, "up": other} | to, {"x": x} | to
        activations = {
            "silu_mul_quantize": gated,
            "gelu_mul_quantize": gated | kinds[turn % 2],
            "gelu_quantize": plain | kinds[1 - turn % 2],
            "relu_quantize": plain,
        }
        for op, arguments in activations.items():
            yield Case(op, arguments)
            if rotate:
                yield Case(op, arguments | {"rotate": rotate})


class Kind(NamedTuple):
    """Scales, bias and result of a product."""

    bias: torch.dtype | None
    out_dtype: torch.dtype
    per_tensor: bool = False


KINDS = (Kind(None, BF16), Kind(F32, F32), Kind(BF16, BF16), Kind(F16, F16), Kind(BF16, F32), Kind(F32, F16, True))
ONE_PASS = (Kind(BF16, BF16), Kind(None, BF16), Kind(F16, F16), Kind(BF16, BF16, True))
"""Those of which a GPU with scales by row and column computes all in the product: a bias has the result's type."""


def _random_scale(count: int, seed: int) -> Tensor:
    return _randn(count, seed=seed).abs() * 0.01 + 1e-4


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, kind: Kind) -> Case:
    """A call with scales a row and a column, or the first of each; the scale of one row is NaN."""
    if kind.per_tensor:
        a_scale, b_scale = a_scale[:1], b_scale[:1]
    elif len(a) > 1:
        a_scale[1] = torch.nan
    bias = None if kind.bias is None else _randn(len(b), seed=5).to(kind.bias)
    arguments = {"a": a, "b": b, "a_scale": a_scale, "b_scale": b_scale, "bias": bias, "out_dtype": kind.out_dtype}
    return Case("w8a8_gemm", arguments)


def _products() -> Iterator[Case]:
    for turn, (m, n, k) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(turn)
        a, b = (torch.randint(-127, 128, shape, generator=generator).to(torch.int8) for shape in ((m, k), (n, k)))
        yield _product(a, b, _random_scale(m, 3), _random_scale(n, 4), KINDS[turn % len(KINDS)])
    largest = torch.full((20, 4096), -127, dtype=torch.int8)
    yield _product(largest, largest[:16], _random_scale(20, 3), _random_scale(16, 4), KINDS[1])


def _fp8_products() -> Iterator[Case]:
    others = itertools.cycle(((E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)))
    for turn, (m, n, k) in enumerate(SHAPES):
        a, b = _randn(m, k), _randn(n, k, seed=1)
        both = ((E4M3, E4M3), ONE_PASS[turn % len(ONE_PASS)]), (next(others), KINDS[turn % len(KINDS)])
        for (a_type, b_type), kind in both:
            q, a_scale = reference.quantize_per_token(a, a_type)
            w, b_scale = reference.quantize_per_token(b, b_type)
            yield _product(q, w, a_scale, b_scale, kind)
    # Sums of one sign, in which the small addends of fast accumulation are lost.
    ones = torch.ones(20, 4096).to(E4M3)
    yield _product(ones, ones[:16], _random_scale(20, 3), _random_scale(16, 4), ONE_PASS[1])


def _experts(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """The weights of every layer in turn; some slots have no expert, and in one case each all have the same or none."""
    for turn, (tokens, top_k, experts, k, inner, n, rotate) in enumerate(MIXTURES):
        dtype, x_dtype = dtypes[turn % len(dtypes)], (F32, BF16, F16)[turn % 3]
        shapes = [(inner, k)] * (1 + turn % 2) + [(n, inner)]
        layers = [reference.quantize_per_token(_randn(experts, *each, seed=i), dtype) for i, each in enumerate(shapes)]
        generator = torch.Generator().manual_seed(turn)
        index = torch.randint(0, experts + 1, (tokens, top_k), generator=generator)
        arguments = {
            "x": _activation(tokens, k, x_dtype),
            "top_k_index": index,
            "top_k_weights": _randn(tokens, top_k, seed=3),
            "weight": [weight for weight, _ in layers],
            "weight_scale": [scale for _, scale in layers],
            "bias": [_randn(experts, rows).to(x_dtype) for rows, _ in shapes] if turn % 3 else None,
            "activation": ("silu", "gelu", "gelu_tanh", "relu")[turn % 4],
            "rotate": [block_size(k), rotate] if rotate else [],
        }
        yield Case("w8a8_experts", arguments)
        if turn in (1, 3):
            for expert in (experts - 1, experts):
                yield Case("w8a8_experts", arguments | {"top_k_index": torch.full_like(index, expert)})


# --- what is right --------------------------------------------------------------------------------------------------


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _bits_difference(actual: Tensor, expected: Tensor) -> str:
    """The first element whose bits are others; a NaN equals any NaN."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return f"{_brief(actual)} instead of {_brief(expected)}"
    if not expected.numel():
        return ""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if expected.dtype.is_floating_point:
        differs &= ~(actual.float().isnan() & expected.float().isnan())
    return _first(differs, actual, expected)


def _fp8_difference(arguments: dict[str, Any], actual: Tensor, on_tensor_cores: bool) -> str:
    exact, bound = gemm_bound(**arguments, on_tensor_cores=on_tensor_cores)
    return _difference(actual, exact.to(arguments["out_dtype"]), exact, bound)


def _difference(actual: Tensor, expected: Tensor, exact: Tensor, bound: Tensor) -> str:
    """The first element that is too far from the exact one; ``expected`` has the dtype and the shape."""
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        return f"{_brief(actual)} instead of {_brief(expected)}"
    largest = torch.finfo(expected.dtype).max  # what is larger becomes infinite
    is_near = (actual.double().clamp(-largest, largest) - exact.clamp(-largest, largest)).abs() <= bound
    return _first(~torch.where(exact.isnan(), actual.isnan(), is_near), actual, exact)


def _first(differs: Tensor, actual: Tensor, expected: Tensor) -> str:
    if not differs.any():
        return ""
    index = tuple(differs.nonzero()[0].tolist())
    count = int(differs.sum())
    return (
        f"{count} of {differs.numel()} elements are wrong, the first at {list(index)}: "
        f"{actual[index].item():.9g} instead of {expected[index].item():.9g}"
    )


def _brief(value: Any) -> str:
    """A tensor by its dtype and shape, other values as they are."""
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value).removeprefix("torch.")
