// w8a8_experts on CUDA devices.
#include <torch/csrc/stable/library.h>

#include "common/op_string.h"
#include "cuda/compute/experts.h"

namespace sq {
namespace {

std::vector<Tensor> all_contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> same;
  for (const Tensor& tensor : tensors) same.push_back(as_contiguous(tensor));
  return same;
}

OptionalTensors all_contiguous(const OptionalTensors& tensors) {
  if (!tensors.has_value()) return std::nullopt;
  std::vector<OptionalTensor> same;
  for (const OptionalTensor& tensor : *tensors) same.push_back(as_contiguous(tensor));
  return same;
}

Tensor w8a8_experts_cuda(const Tensor& x_in, const Tensor& index_in, const Tensor& weights_in,
                         const std::vector<Tensor>& weight_in, const std::vector<Tensor>& weight_scale_in,
                         const OptionalTensors& bias_in, const OpString& activation, const Rotations& rotate) {
  constexpr const char* kOp = "w8a8_experts";
  const ExpertsShapes shapes =
      check_experts(kOp, x_in, index_in, weights_in, {weight_in, weight_scale_in, bias_in}, rotate);
  const Activation kind = activation_kind(kOp, activation);
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), index = as_contiguous(index_in), weights = as_contiguous(weights_in);
  const std::vector<Tensor> weight = all_contiguous(weight_in), weight_scale = all_contiguous(weight_scale_in);
  const OptionalTensors bias = all_contiguous(bias_in);
  return run_experts(kOp, {x, index, weights, {weight, weight_scale, bias}, shapes, kind, rotate});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) { m.impl("w8a8_experts", TORCH_BOX(&w8a8_experts_cuda)); }

}  // namespace sq
