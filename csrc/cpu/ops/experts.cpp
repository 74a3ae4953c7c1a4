// w8a8_experts on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/experts_checks.h"
#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "cpu/compute/experts.h"
#include "cpu/kernels/epilogue.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_experts";

Tensor w8a8_experts_cpu(const Tensor& x_in, const Tensor& index_in, const Tensor& weights_in,
                        const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                        const OptionalTensors& bias, const OpString& activation, const Rotations& rotate) {
  const LayerLists layers{weight, weight_scale, bias};
  const ExpertsShapes shapes = check_experts(kOp, x_in, index_in, weights_in, layers, rotate);
  const Activation kind = activation_kind(kOp, activation);
  const Tensor x = as_contiguous(x_in), index = as_contiguous(index_in), weights = as_contiguous(weights_in);
  const auto* chosen = pointer<int64_t>(index);
  const int64_t slots = index.numel();
  for (int64_t slot = 0; slot < slots; ++slot) {
    SQ_CHECK(0 <= chosen[slot] && chosen[slot] <= shapes.experts, kOp, ": top_k_index has ", chosen[slot],
             ", expected 0 to ", shapes.experts - 1, ", or E=", shapes.experts, " for no expert");
  }
  const auto packed = [&](size_t i) { return ExpertWeights(shapes.layers[i], shapes.experts, layers[i]); };
  const Experts experts{shapes.experts,
                        shapes.top_k,
                        packed(0),
                        is_gated(layers) ? std::optional<ExpertWeights>(packed(1)) : std::nullopt,
                        packed(layers.size() - 1),
                        kind,
                        element_of(rotate, 0),
                        element_of(rotate, 1)};
  Tensor y = empty_cpu(replace_last(x, experts.down.n()), x.scalar_type());
  Scratch wide(slots * static_cast<int64_t>(sizeof(float)));
  auto* wide_weights = reinterpret_cast<float*>(wide.data());
  widen(weights.const_data_ptr(), kernel_dtype(weights.scalar_type()), -0.0f, slots, wide_weights);
  experts.run(current_kernels(), x.const_data_ptr(), chosen, wide_weights, shapes.tokens, kernel_dtype(x.scalar_type()),
              y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_experts", TORCH_BOX(&w8a8_experts_cpu)); }

}  // namespace sq
