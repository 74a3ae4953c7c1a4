"""Arguments of ``w8a8_decoder_layer_`` and ways to change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from op_testing import FLOATS, randn
from torch import Tensor

from smoothquant_ext import reference

Arguments = dict[str, Any]


class Sizes(NamedTuple):
    """Of a layer. None of the widths is one that tensor cores take."""

    k: int = 40
    inner: int = 70
    d: int = 10
    heads: int = 4
    kv_heads: int = 2


EVEN = Sizes(64, 96, 16, 4, 2)
"""Widths that cuBLASLt multiplies."""


def operands(
    batch: int,
    time: int,
    past: int,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes = Sizes(),  # noqa: B008
) -> Arguments:
    """The fewest, all by name."""
    k, inner, d, heads, kv_heads = sizes
    q_n, k_n = heads * d, kv_heads * d
    shapes = [(q_n, k), (k_n, k), (k_n, k), (k, q_n), (inner, k), (inner, k), (k, inner)]
    weights = [reference.quantize_per_token(randn(*shape, seed=i), torch.int8) for i, shape in enumerate(shapes)]
    angles = randn(batch, time, d, seed=20)
    cache = randn(2, batch, kv_heads, past + time + 5, d, seed=21, dtype=dtype)
    return {
        "x": randn(batch, time, k, dtype=dtype),
        "norm": randn(k, seed=22, dtype=dtype),
        "post_norm": randn(k, seed=23),
        "eps": 1e-5,
        "post_eps": 1e-6,
        "offset": 0.0,
        "weight": [weight for weight, _ in weights],
        "weight_scale": [scale for _, scale in weights],
        "bias": None,
        "input_scale": None,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": cache[0].contiguous(),
        "values": cache[1].contiguous(),
        "past": past,
        "mask": None,
        "scale": 0.3,
        "causal": time > 1,
        "activation": "silu",
    }


def heads_of(arguments: Arguments) -> int:
    """The heads of q."""
    heads: int = arguments["weight"][0].shape[0] // arguments["cos"].shape[-1]
    return heads


def with_biases(arguments: Arguments) -> Arguments:
    """A bias for every second layer, and norms that add 1 to their weights."""
    counts = [weight.numel() for weight in arguments["weight_scale"]]
    biases = [randn(n, seed=30 + i) if i % 2 == 0 else None for i, n in enumerate(counts)]
    return arguments | {"bias": biases, "offset": 1.0}


def with_static_scales(arguments: Arguments, dynamic: tuple[int, ...] = ()) -> Arguments:
    """Static scales for all inputs but the ``dynamic`` ones."""
    scales = [None if i in dynamic else torch.tensor([0.02 + 0.01 * i]) for i in range(4)]
    return arguments | {"input_scale": scales}


def with_int8_cache(arguments: Arguments) -> Arguments:
    """The same with the cache quantized."""
    keys, keys_scale = reference.quantize_per_token(arguments["keys"], torch.int8)
    values, values_scale = reference.quantize_per_token(arguments["values"], torch.int8)
    return arguments | {"keys": keys, "values": values, "keys_scale": keys_scale, "values_scale": values_scale}


def with_head_norms(arguments: Arguments) -> Arguments:
    """The same with norms of the heads of q and k."""
    d, dtype = arguments["cos"].shape[-1], arguments["x"].dtype
    norms = {"q_norm": randn(d, seed=24, dtype=dtype), "k_norm": randn(2 * d, seed=25)[::2], "head_eps": 1e-3}
    return arguments | norms


def with_mask(arguments: Arguments, batch: int | None = None, heads: int = 1, causal: bool = False) -> Arguments:
    """A random mask that hides no key from all; of every batch if none is said. With positions, of the whole room."""
    b, time, _ = arguments["x"].shape
    has_positions = arguments.get("positions") is not None
    length = arguments["keys"].shape[2] if has_positions else arguments["past"] + time
    mask = randn(b if batch is None else batch, heads, time, length, seed=26) > -0.5
    mask[..., 0] = True
    return arguments | {"mask": mask, "causal": causal}


def with_positions(arguments: Arguments, *positions: int) -> Arguments:
    """The same with positions, those behind ``past`` if none are said, causal and without a mask."""
    time, past = arguments["x"].shape[1], arguments["past"]
    at = torch.tensor(positions or range(past, past + time), dtype=torch.int64)
    return arguments | {"positions": at, "past": -7, "causal": True}


def side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors as slices of one buffer."""
    whole = torch.cat([tensor.view(torch.uint8).flatten() for tensor in tensors])
    parts = whole.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def joined(arguments: Arguments, biases: tuple[bool, ...] = (True,) * 7) -> Arguments:
    """q, k, v and gate, up lie side by side, with the ``biases`` named."""
    counts = [weight.shape[0] for weight in arguments["weight"]]
    bias = [randn(n, seed=40 + i, dtype=torch.bfloat16) for i, n in enumerate(counts)]
    lists = {"weight": arguments["weight"], "weight_scale": arguments["weight_scale"], "bias": bias}
    joined = {
        name: [*side_by_side(every[:3]), every[3], *side_by_side(every[4:6]), every[6]] for name, every in lists.items()
    }
    joined["bias"] = [each if has else None for each, has in zip(joined["bias"], biases, strict=True)]
    return arguments | joined


WAYS: dict[str, Callable[[Arguments], Arguments]] = {
    "plain": lambda plain: plain,
    "not causal": lambda plain: plain | {"causal": False},
    "biases": with_biases,
    "static": lambda plain: with_static_scales(plain, (1,)),
    "int8 cache": with_int8_cache,
    "head norms": with_head_norms,
    "head norms, int8 cache": lambda plain: with_int8_cache(with_head_norms(with_biases(plain))),
    "mask": with_mask,
    "one mask": lambda plain: with_mask(plain, batch=1, causal=True),
    "mask of each head": lambda plain: with_mask(with_int8_cache(plain), heads=heads_of(plain)),
    "one mask of each head": lambda plain: with_mask(plain, batch=1, heads=heads_of(plain)),
    "positions": with_positions,
    "positions, mask": lambda plain: with_mask(with_positions(with_int8_cache(plain))),
    "positions, causal mask": lambda plain: with_mask(with_positions(plain), causal=True),
    "joined": lambda plain: joined(plain),
    "joined, no bias": lambda plain: joined(plain, (False,) * 7),
    "joined, a bias missing": lambda plain: joined(plain, (True, False, True, True, True, False, True)),
}


def variants() -> Iterator[tuple[str, Arguments]]:
    """Named arguments: every way that the op takes on a GPU, the dtypes in turn."""
    turn = 0
    for heads in ((4, 2), (3, 3)):
        for batch, time, past in ((1, 1, 0), (2, 1, 17), (2, 5, 0), (2, 3, 9)):
            turn += 1
            for number, name in enumerate(WAYS):
                dtype = FLOATS[(turn + number) % 3]
                plain = operands(batch, time, past, dtype, Sizes(heads=heads[0], kv_heads=heads[1]))
                yield f"{name}, {dtype}, heads {heads}, batch {batch}, time {time}, past {past}", WAYS[name](plain)
