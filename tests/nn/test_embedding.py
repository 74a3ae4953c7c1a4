"""The token embedding that reads an 8-bit output embedding: its rows, against plain torch."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from smoothquant_ext import ops
from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.hadamard import rotate_blocks
from smoothquant_ext.nn.embedding import W8A8Embedding
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.packing import unpack_rows
from smoothquant_ext.quantization.convert import quantize_linear
from smoothquant_ext.scheme import SCHEMES

DTYPES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def head(v: int, d: int, rotate: int = 0, smooth: bool = False, scheme: str = "int8") -> W8A8Linear:
    generator = torch.Generator().manual_seed(v * 1000 + d)
    linear = nn.Linear(d, v, bias=False)
    linear.weight = nn.Parameter(torch.randn(v, d, generator=generator))
    scale = torch.rand(d, generator=generator) + 0.5 if smooth else None
    return quantize_linear(linear, None, SCHEMES[scheme], None, scale, rotate)


def oracle(layer: W8A8Linear, tokens: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    rows = layer.plain_weight().float() * layer.weight_scale.expand(layer.out_features, 1)
    rows = rotate_blocks(rows, layer.rotate)
    rows = rows if layer.smooth is None else rows / layer.smooth
    return rows[tokens].to(dtype) * torch.tensor(factor, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("smooth", [False, True], ids=["", "smooth"])
@pytest.mark.parametrize(("v", "d", "rotate"), [(1, 1, 0), (97, 33, 0), (64, 16, 16), (130, 64, 64), (200, 192, 64)])
def test_rows(v: int, d: int, rotate: int, smooth: bool, packed: bool, shape: tuple[int, ...]) -> None:
    layer = head(v, d, rotate, smooth)
    if not packed:
        layer._unpack_()
    tokens = torch.randint(0, v, shape, generator=torch.Generator().manual_seed(1))
    # The oracle's rotation is summed in the same order: both multiply by the same matrix of 1 and -1 over a root.
    expected = oracle(layer, tokens, 3.25, torch.float32)
    actual = W8A8Embedding(layer, torch.tensor([3.25]))(tokens)
    assert actual.shape == (*shape, d)
    # Of a sum of ``rotate`` terms, which both take in an order of their own.
    bound = 4 * max(1, rotate) * torch.finfo(torch.float32).eps * oracle(layer, torch.arange(v), 3.25, torch.float32)
    assert bool((actual - expected).abs().max() <= bound.abs().max()) if actual.numel() else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "fp8-e5m2"])
def test_the_dtype_is_that_of_the_factor(scheme: str, dtype: torch.dtype) -> None:
    layer, tokens = head(97, 33, scheme=scheme), torch.arange(97)
    embedding = W8A8Embedding(layer, torch.tensor([1.1])).to(dtype)
    assert torch.equal(embedding(tokens), oracle(layer, tokens, 1.1, dtype))
    assert torch.equal(embedding.weight, oracle(layer, tokens, 1.0, dtype)), "what nn.Embedding would hold"


def test_a_scale_for_the_whole_weight() -> None:
    layer = quantize_linear(nn.Linear(32, 70, bias=False), None, replace(SCHEMES["int8"], weight="tensor"))
    layer._unpack_()
    assert layer.weight_scale.shape == (1,)
    embedding = W8A8Embedding(layer, torch.ones(1))
    assert torch.equal(embedding(torch.arange(70)), oracle(layer, torch.arange(70), 1.0, torch.float32))


@pytest.mark.parametrize("token", [-1, 97, 100, 1 << 40])  # 100 has a place in the last panel of the packed weight
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_token_that_there_is_none_of(token: int, packed: bool) -> None:
    layer = head(97, 32)
    if not packed:
        layer._unpack_()
    with pytest.raises(IndexError, match="index out of range"):
        W8A8Embedding(layer, torch.ones(1))(torch.tensor([[3, token]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (65, 63), (200, 130)])
def test_rows_of_a_packed_weight(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8).float().to(dtype)
    rows = torch.randint(0, n, (3, 7))
    found = unpack_rows(ops.prepack_weight(weight), rows, k)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.int8), weight.view(torch.int8)[rows])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = head(70, 32, 16)
        self.tokens = W8A8Embedding(self.head, torch.ones(1))


def test_it_follows_its_head() -> None:
    model, ids = Model(), torch.arange(70)
    expected = model.tokens(ids)
    assert [name for name, _ in model.named_parameters()] == ["tokens.factor"], "the weight is the head's alone"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.tokens.head is other.head
        assert torch.equal(other.tokens(ids), expected)
    assert model.to(torch.bfloat16).tokens(ids).dtype == torch.bfloat16
    assert torch.equal(model.float().tokens(ids), expected), "1 and -1 are exact in 16 bits"


def test_without_memory_for_a_moment() -> None:
    model = Model()
    state, expected = copy.deepcopy(model.state_dict()), model.tokens(torch.arange(70))
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model.tokens(torch.arange(70)), expected)


def test_a_head_that_is_offloaded() -> None:
    layer = head(70, 32)
    embedding = W8A8Embedding(layer, torch.ones(1))
    layer.weight = layer.weight.to("meta")
    with pytest.raises(SmoothQuantError, match="is offloaded; give a device_map"):
        embedding(torch.tensor([1]))


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu() -> None:
    layer, ids = head(97, 64, 64, smooth=True), torch.tensor([[0, 96, 5]])
    embedding = W8A8Embedding(layer, torch.tensor([2.0]))
    expected = embedding(ids)
    layer.cuda()
    embedding.cuda()
    actual = embedding(ids.cuda())
    assert actual.device.type == "cuda"
    assert torch.equal(actual.cpu(), expected)
