// w8a8_linear, w8a8_linear_group and w8a8_mlp on CUDA devices: quantization, products and activations one after the other.
// Layers of one input whose tensors lie side by side are one product.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/gemm_checks.h"
#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "cuda/compute/joined_layers.h"
#include "cuda/compute/quantize.h"

namespace sq {
namespace {

Tensor w8a8_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                        const OptionalTensor& input_scale, const OptionalTensor& smooth,
                        std::optional<ScalarType> out_dtype, int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear";
  const LayerTensors layer{weight, weight_scale, bias};
  const GemmShape shape = check_linear(kOp, x, layer, out_dtype, rotate);
  check_smooth(kOp, smooth, x);
  const float* static_scale = static_scale_pointer(kOp, "input_scale", input_scale, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const auto [q, scale] = quantize_rows_cuda(kOp, as_contiguous(x), smooth, static_scale, weight.scalar_type(), rotate);
  return multiply_cuda(kOp, q, scale, layer, shape, out_dtype.value_or(x.scalar_type()));
}

std::vector<Tensor> w8a8_linear_group_cuda(const Tensor& x, const std::vector<Tensor>& weight,
                                           const std::vector<Tensor>& weight_scale, const OptionalTensors& bias,
                                           const OptionalTensor& input_scale, std::optional<ScalarType> out_dtype,
                                           int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear_group";
  const LayerLists layers{weight, weight_scale, bias};
  const std::vector<GemmShape> shapes = check_linear_group(kOp, x, layers, out_dtype, rotate);
  const float* static_scale = static_scale_pointer(kOp, "input_scale", input_scale, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const auto [q, scale] =
      quantize_rows_cuda(kOp, as_contiguous(x), std::nullopt, static_scale, weight[0].scalar_type(), rotate);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  // The parts of several rows would have to be copied: results are contiguous.
  const size_t together = shapes[0].m == 1 ? layers.size() : 1;
  std::vector<Tensor> outputs;
  while (outputs.size() < layers.size()) {
    for (Tensor& y : multiply_joined_cuda(kOp, q, scale, layers, shapes.data(), outputs.size(), together, dtype)) {
      outputs.push_back(std::move(y));
    }
  }
  return outputs;
}

Tensor w8a8_mlp_cuda(const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                     const OptionalTensors& bias, const OptionalTensors& input_scale, const OpString& activation,
                     const Rotations& rotate) {
  constexpr const char* kOp = "w8a8_mlp";
  const LayerLists layers{weight, weight_scale, bias};
  const std::vector<GemmShape> shapes = check_mlp(kOp, x, layers, input_scale, rotate);
  const Activation kind = activation_kind(kOp, activation);
  const auto static_scale = [&](size_t index) {
    return static_scale_pointer(kOp, mlp_input_scale_name(layers, index), element_of(input_scale, index), "x", x);
  };
  const float *x_scale = static_scale(0), *hidden_scale = static_scale(1);
  const DeviceGuard guard(x.get_device_index());
  const ScalarType dtype = x.scalar_type();
  const size_t down = layers.size() - 1;
  const auto [q, scale] =
      quantize_rows_cuda(kOp, as_contiguous(x), std::nullopt, x_scale, weight[0].scalar_type(), element_of(rotate, 0));
  const std::vector<Tensor> first = multiply_joined_cuda(kOp, q, scale, layers, shapes.data(), 0, down, dtype);
  const OptionalTensor up = is_gated(layers) ? OptionalTensor(first[1]) : std::nullopt;
  const auto [hidden, hidden_scales] =
      activate_quantize_cuda(kOp, kind, first[0], up, weight[down].scalar_type(), hidden_scale, element_of(rotate, 1));
  return multiply_cuda(kOp, hidden, hidden_scales, layers[down], shapes[down], dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) {
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear_cuda));
  m.impl("w8a8_linear_group", TORCH_BOX(&w8a8_linear_group_cuda));
  m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cuda));
}

}  // namespace sq
