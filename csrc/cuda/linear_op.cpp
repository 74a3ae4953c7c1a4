// w8a8_linear, w8a8_linears and w8a8_mlp on CUDA devices: quantization, products and activations one after the other.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/gemm_args.h"
#include "cuda/producers.h"
#include "cuda/product.h"
#include "op_string.h"

namespace sq {
namespace {

Tensor w8a8_linear_cuda(const Tensor& x, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias,
                        const OptionalTensor& a_scale, const OptionalTensor& smooth,
                        std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linear";
  const GemmShape shape = check_linear(kOp, x, b, b_scale, bias, out_dtype);
  check_smooth(kOp, smooth, x);
  const float* static_scale = static_scale_pointer(kOp, "a_scale", a_scale, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const auto [q, scale] = quantize_rows_cuda(kOp, as_contiguous(x), smooth, static_scale, b.scalar_type());
  return multiply_cuda(kOp, q, scale, b, b_scale, bias, shape, out_dtype.value_or(x.scalar_type()));
}

std::vector<Tensor> w8a8_linears_cuda(const Tensor& x, const std::vector<Tensor>& b, const std::vector<Tensor>& b_scale,
                                      const std::vector<Tensor>& bias, const OptionalTensor& a_scale,
                                      std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linears";
  const std::vector<GemmShape> shapes = check_linears(kOp, x, b, b_scale, bias, out_dtype);
  const float* static_scale = static_scale_pointer(kOp, "a_scale", a_scale, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const auto [q, scale] = quantize_rows_cuda(kOp, as_contiguous(x), std::nullopt, static_scale, b[0].scalar_type());
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < b.size(); ++i) {
    const OptionalTensor own_bias = bias.empty() ? OptionalTensor() : OptionalTensor(bias[i]);
    outputs.push_back(
        multiply_cuda(kOp, q, scale, b[i], b_scale[i], own_bias, shapes[i], out_dtype.value_or(x.scalar_type())));
  }
  return outputs;
}

Tensor w8a8_mlp_cuda(const Tensor& x, const Tensor& gate_b, const Tensor& gate_scale, const Tensor& down_b,
                     const Tensor& down_scale, const OptionalTensor& up_b, const OptionalTensor& up_scale,
                     const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                     const OptionalTensor& a_scale, const OptionalTensor& down_a_scale, const OpString& activation) {
  constexpr const char* kOp = "w8a8_mlp";
  const MlpShapes shapes = check_mlp(kOp, x, gate_b, gate_scale, down_b, down_scale, up_b, up_scale, gate_bias, up_bias,
                                     down_bias, activation);
  const float* x_scale = static_scale_pointer(kOp, "a_scale", a_scale, "x", x);
  const float* hidden_scale = static_scale_pointer(kOp, "down_a_scale", down_a_scale, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = x.scalar_type();
  const auto [q, scale] = quantize_rows_cuda(kOp, as_contiguous(x), std::nullopt, x_scale, gate_b.scalar_type());
  const Tensor gate = multiply_cuda(kOp, q, scale, gate_b, gate_scale, gate_bias, shapes.gate, dtype);
  OptionalTensor up;
  if (up_b.has_value()) up = multiply_cuda(kOp, q, scale, *up_b, *up_scale, up_bias, *shapes.up, dtype);
  const auto [hidden, hidden_scales] =
      activate_quantize_cuda(kOp, shapes.activation, gate, up, down_b.scalar_type(), hidden_scale);
  return multiply_cuda(kOp, hidden, hidden_scales, down_b, down_scale, down_bias, shapes.down, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) {
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear_cuda));
  m.impl("w8a8_linears", TORCH_BOX(&w8a8_linears_cuda));
  m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cuda));
}

}  // namespace sq
