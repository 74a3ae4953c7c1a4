"""The small set of cases that proves what stands between the products and the attention of a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import reference

K, INNER, PAST, SPARE = 128, 96, 7, 4


def decoder_layers() -> Iterator[dict[str, Any]]:
    """Arguments of ``w8a8_decoder_layer_``, in which each query sees one key, whose value is exact in every dtype.

    Then the attention is that value, in whatever order torch adds, and the layer has the oracle's bits.
    """
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    alone = _layer(bf16, (3, 1), (8, 2, 64), past=0)
    yield alone
    yield _layer(f16, (1, 1), (3, 3, 10), past=0) | _head_norms(10)
    yield _layer(f32, (3, 1), (3, 3, 10), past=0, inner=128) | {"rotate": [128, 0, 64, 128]}
    yield (
        _layer(bf16, (2, 1), (8, 2, 64), past=0, inner=256)
        | _head_norms(64)
        | _positions(0)
        | {"rotate": [64, 256, 128, 256]}
    )
    for dtype, heads in ((f16, (4, 2, 128)), (bf16, (3, 3, 10)), (f32, (4, 1, 66))):
        for batch, time in ((2, 5), (2, 1)):
            layer = _layer(dtype, (batch, time), heads, PAST) | _head_norms(heads[-1])
            yield layer | _one_key(batch, 1, time, PAST + time)
            yield layer | _one_key(1, heads[0], time, PAST + time)
            room = layer["keys"].shape[2]
            at = _positions(*torch.randperm(SPARE + time, generator=_generator(3))[:time].add(PAST).tolist())
            yield _int8_cache(layer) | at | _one_key(batch, heads[0], time, room)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def _layer(
    dtype: torch.dtype, tokens: tuple[int, int], heads: tuple[int, int, int], past: int, inner: int = INNER
) -> dict[str, Any]:
    """Batch and time, heads of q, of k, and their width, and that of the MLP; a cache of small integers."""
    (batch, time), (count, kv_count, d) = tokens, heads
    q_n, kv_n = count * d, kv_count * d
    shapes = [(q_n, K), (kv_n, K), (kv_n, K), (K, q_n), (inner, K), (inner, K), (K, inner)]
    weights = [reference.quantize_per_token(_randn(*shape, seed=i), torch.int8) for i, shape in enumerate(shapes)]
    angles = _randn(1, time, d, seed=10)
    room = past + time + SPARE
    cache = torch.randint(-8, 9, (2, batch, kv_count, room, d), generator=_generator(11)).to(dtype)
    return {
        "x": _randn(batch, time, K, seed=12).to(dtype),
        "norm": _randn(K, seed=13).to(dtype),
        "post_norm": _randn(K, seed=14),
        "eps": 1e-5,
        "post_eps": 1e-6,
        "offset": 1.0,
        "weight": [weight for weight, _ in weights],
        "weight_scale": [scale for _, scale in weights],
        "bias": [_randn(n, seed=20 + i) if i % 2 else None for i, (n, _) in enumerate(shapes)],
        "input_scale": None,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "keys": cache[0].clone(),
        "values": cache[1].clone(),
        "past": past,
        "mask": None,
        "scale": d**-0.5,
        "causal": False,
    }


def _head_norms(d: int) -> dict[str, Any]:
    return {"q_norm": _randn(d, seed=15), "k_norm": _randn(d, seed=16).to(torch.bfloat16), "head_eps": 1e-6}


def _positions(*at: int) -> dict[str, Any]:
    return {"positions": torch.tensor(at), "causal": True}


def _one_key(batch: int, heads: int, time: int, length: int) -> dict[str, Any]:
    """A mask that shows each query one of the old keys."""
    chosen = torch.randint(0, PAST, (batch, heads, time, 1), generator=_generator(17))
    mask = torch.arange(length) == chosen
    return {"mask": mask, "causal": False}


def _int8_cache(layer: dict[str, Any]) -> dict[str, Any]:
    shape = layer["keys"].shape[:3]
    scales = {"keys_scale": torch.full(shape, 0.5), "values_scale": torch.full(shape, 0.25)}
    return {
        name: value.to(torch.int8) if name in ("keys", "values") else value for name, value in layer.items()
    } | scales
