"""What a GPU adds to the tests of the ops: shapes that cuBLASLt computes, streams, graphs, devices, whole modules.

Everything that has no need of a GPU runs on the CPU too, so that the tests themselves are tested.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from op_testing import (
    EIGHT_BIT,
    HAS_CUDA,
    assert_same_bits,
    check_int8_product,
    check_largest_int8_sums,
    moved_to,
    randn,
    random_int8,
    run_on,
    scales,
)
from torch import Tensor
from torch._dynamo.utils import counters

from smoothquant_ext import ops, reference
from smoothquant_ext.nn.linear import W8A8Linear
from smoothquant_ext.scheme import SCHEMES

DEVICES = ["cpu", *(["cuda"] if HAS_CUDA else [])]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU on which the CUDA kernels may run")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2 or not HAS_CUDA, reason="needs two GPUs")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Where our kernels run, and may."""
    name: str = request.param
    return name


def weight(n: int, k: int, dtype: torch.dtype = torch.int8, seed: int = 1) -> tuple[Tensor, Tensor]:
    return reference.quantize_per_token(randn(n, k, seed=seed), dtype)


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [8, 9, 16, 17, 31, 128, 129, 1000])
@pytest.mark.parametrize(("n", "k"), [(4, 16), (12, 32), (64, 64), (576, 576), (1536, 576), (2048, 4096), (4100, 48)])
def test_int8_products_of_sizes_that_tensor_cores_take(device: str, m: int, n: int, k: int) -> None:
    check_int8_product(device, m, n, k)


def test_int8_sums_of_the_largest_kind(device: str) -> None:
    check_largest_int8_sums(device)


def test_int8_in_more_rows_than_are_multiplied_together(device: str) -> None:
    m, n, k = 1100, 65600, 16  # 256 MiB of sums are 1023 rows
    a, b = random_int8(m, k), random_int8(n, k, seed=1)
    arguments = (a, b, scales(m), scales(n), None, torch.bfloat16)
    y = run_on(device, ops.w8a8_gemm, *arguments)
    for rows in (slice(0, 3), slice(766, 771), slice(1097, 1100)):
        own = (a[rows], b, scales(m)[rows], scales(n), None, torch.bfloat16)
        assert_same_bits(y[rows], reference.w8a8_gemm(*own))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_memory_that_is_not_aligned(device: str, offset: int) -> None:
    m, n, k = 33, 64, 64
    a, b = random_int8(m * k + offset)[offset:].view(m, k), random_int8(n * k + offset, seed=1)[offset:].view(n, k)
    a_there, b_there = (torch.zeros(t.numel() + offset, dtype=torch.int8, device=device)[offset:] for t in (a, b))
    a_there, b_there = a_there.copy_(a.flatten()).view(m, k), b_there.copy_(b.flatten()).view(n, k)
    expected = reference.w8a8_gemm(a, b, scales(m), scales(n))
    assert_same_bits(ops.w8a8_gemm(a_there, b_there, scales(m).to(device), scales(n).to(device)), expected)
    x = randn(m, k + 8, dtype=torch.bfloat16).to(device)[:, offset : k + offset]
    for actual, one in zip(
        ops.quantize_per_token(x, torch.int8), reference.quantize_per_token(x.cpu(), torch.int8), strict=True
    ):
        assert_same_bits(actual, one)


@pytest.mark.parametrize("columns", [16384, 16392, 32768, 32776, 65536, 100000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_rows(device: str, columns: int, dtype: torch.dtype) -> None:
    x, up, w = randn(3, columns, dtype=dtype), randn(3, columns, dtype=dtype, seed=1), randn(columns, seed=2)
    calls: tuple[tuple[Any, Any, tuple[Any, ...]], ...] = (
        (ops.quantize_per_token, reference.quantize_per_token, (x, torch.int8)),
        (ops.rms_norm_quantize, reference.rms_norm_quantize, (x, w, 1e-5, torch.int8, up)),
        (ops.layer_norm_quantize, reference.layer_norm_quantize, (x, w, w, 1e-5, torch.int8)),
        (ops.silu_mul_quantize, reference.silu_mul_quantize, (x, up, torch.int8)),
    )
    for op, oracle, arguments in calls:
        for actual, expected in zip(run_on(device, op, *arguments), oracle(*arguments), strict=True):
            assert_same_bits(actual, expected, oracle.__name__)


# --- layers ---------------------------------------------------------------------------------------------------------


def mlp(k: int, inner: int, n: int) -> dict[str, list[Tensor]]:
    """``weight`` and ``weight_scale`` of gate, up and down."""
    layers = [weight(*shape, seed=seed) for seed, shape in enumerate(((inner, k), (inner, k), (n, inner)))]
    return {"weight": [w for w, _ in layers], "weight_scale": [scale for _, scale in layers]}


@pytest.mark.parametrize("m", [0, 1, 8, 40])
@pytest.mark.parametrize("is_static", [False, True])
def test_layers_equal_the_oracle(device: str, m: int, is_static: bool) -> None:
    x = randn(m, 64, dtype=torch.bfloat16)
    if m > 4:
        x[2, 3] = torch.nan
        x[3] = 0
    one = torch.tensor([0.02]) if is_static else None
    layers = mlp(64, 96, 48)
    group = (x, layers["weight"][:2], layers["weight_scale"][:2], None, one)
    for actual, expected in zip(
        run_on(device, ops.w8a8_linear_group, *group), reference.w8a8_linear_group(*group), strict=True
    ):
        assert_same_bits(actual, expected)
    for activation in reference.ACTIVATIONS:
        keywords: dict[str, Any] = {**layers, "input_scale": [one, one], "activation": activation}
        assert_same_bits(run_on(device, ops.w8a8_mlp, x, **keywords), reference.w8a8_mlp(x, **keywords), activation)


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8", "fp8-static"])
def test_modules_move(device: str, scheme: str) -> None:
    x, values = randn(20, 64), randn(96, 64, seed=1)
    module = W8A8Linear(64, 96, True, SCHEMES[scheme])
    module.weight, scale = reference.quantize_per_token(values, SCHEMES[scheme].dtype)
    module.weight_scale = scale[:, None]
    if SCHEMES[scheme].weight == "tensor":
        module.weight_scale = scale.max().reshape(1)
        module.weight = reference.quantize_static(values, module.weight_scale, SCHEMES[scheme].dtype)
    if module.input_scale is not None:
        module.input_scale.fill_(0.03)
    module.bias = randn(96, seed=2)
    module.prepack_()
    with torch.no_grad():
        expected = module(x)
        moved = module.to(device)
        y = moved(x.to(device)).cpu()
        back = module.to("cpu")(x)
    assert_same_bits(back, expected)
    if scheme.startswith("int8"):
        assert_same_bits(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=0.03, atol=0.03)  # see test_ops_fp8 for the bound


def test_a_compiled_layer_is_one_graph(device: str) -> None:
    b, b_scale = moved_to(device, weight(48, 64))
    layers, norm = moved_to(device, mlp(64, 96, 64)), torch.ones(64, device=device)

    def forward(x: Tensor) -> Tensor:
        h = ops.w8a8_mlp(x, **layers)
        q, scale, _ = ops.rms_norm_quantize(h, norm, 1e-5, torch.int8, x)
        return ops.w8a8_gemm(q, b, scale, b_scale, None, torch.float32) + 1

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 17, 23):
        x = randn(rows, 64, seed=rows).to(device)
        assert_same_bits(compiled(x), forward(x))
    assert counters["stats"]["unique_graphs"] == 1


# --- only a GPU has these -------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("m", [1, 64])
def test_cuda_graphs_capture_a_layer(m: int, dtype: torch.dtype) -> None:
    b, b_scale = moved_to("cuda", weight(96, 64, dtype))
    x = randn(m, 64).cuda()
    ops.w8a8_linear(x, b, b_scale)  # makes cuBLASLt's handle, which allocates
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.w8a8_linear(x, b, b_scale)
    for seed in (1, 2):
        x.copy_(randn(m, 64, seed=seed))
        graph.replay()
        assert_same_bits(y, ops.w8a8_linear(x, b, b_scale))


@needs_cuda
def test_ops_run_on_the_current_stream() -> None:
    b, b_scale = moved_to("cuda", weight(1024, 1024))
    x = randn(512, 1024, dtype=torch.bfloat16).cuda()
    expected = ops.w8a8_linear(x, b, b_scale)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)  # whoever does not wait for this stream sees zeros
        late.copy_(x)
        y = ops.w8a8_linear(late, b, b_scale)
    stream.synchronize()
    assert_same_bits(y, expected)


@needs_cuda
def test_threads_share_a_device() -> None:
    shapes = [(9 + i, 64 * (1 + i % 3), 64) for i in range(12)]
    failures: list[object] = []

    def work(index: int) -> None:
        m, n, k = shapes[index]
        a, b = random_int8(m, k, seed=index), random_int8(n, k, seed=index + 1)
        arguments = (a, b, scales(m), scales(n))
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                y = run_on("cuda", ops.w8a8_gemm, *arguments)
                if not torch.equal(y, reference.w8a8_gemm(*arguments)):
                    failures.append(shapes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(shapes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_cuda
def test_nothing_waits_for_the_device() -> None:
    b, b_scale = moved_to("cuda", weight(64, 64))
    x, a_scale = randn(33, 64).cuda(), torch.ones(1, device="cuda")
    calls = (
        lambda: ops.w8a8_linear(x, b, b_scale),
        lambda: ops.w8a8_linear(x, b, b_scale, input_scale=a_scale),
        lambda: ops.rms_norm_quantize(x, x[0], 1e-5, torch.int8, x, a_scale),
        lambda: ops.silu_mul_quantize(x, x, torch.float8_e4m3fn),
    )
    for call in calls:
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize(
    ("op", "arguments", "sentence"),
    [
        (
            ops.w8a8_gemm,
            lambda a, b: (a, b.cpu(), a.new_ones(1).float(), b.new_ones(1).float()),
            "b is on another device",
        ),
        (ops.quantize_static, lambda a, _: (a.float(), torch.ones(1), torch.int8), "scale is on another device than x"),
        (ops.silu_mul_quantize, lambda a, b: (a.float(), b.float().cpu(), torch.int8), "up is on another device"),
        (ops.rms_norm, lambda a, _: (a.float(), torch.ones(64), 1e-5), "weight is on another device than x"),
    ],
)
def test_other_devices_are_refused(op: Any, arguments: Any, sentence: str) -> None:
    a, b = random_int8(9, 64).cuda(), random_int8(9, 64).cuda()
    with pytest.raises(RuntimeError, match=sentence):
        op(*arguments(a, b))


@needs_cuda
def test_packed_weights_are_refused() -> None:
    b, b_scale = weight(9, 40)
    packed = ops.prepack_weight(b).cuda()
    with pytest.raises(RuntimeError, match="b is packed for the CPU kernels"):
        ops.w8a8_linear(randn(3, 40).cuda(), packed, b_scale.cuda())


@needs_two
def test_a_device_that_is_not_the_current_one() -> None:
    b, b_scale = weight(96, 64)
    x = randn(40, 64)
    expected = reference.w8a8_linear(x, b, b_scale)
    assert torch.cuda.current_device() == 0
    assert_same_bits(run_on("cuda:1", ops.w8a8_linear, x, b, b_scale), expected)
    with pytest.raises(RuntimeError, match="b is on another device than x"):
        ops.w8a8_linear(x.to("cuda:0"), b.to("cuda:1"), b_scale.to("cuda:1"))
