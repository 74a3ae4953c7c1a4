// Arguments of w8a8_experts, for every device. The values of top_k_index, which only a CPU can look at without waiting, are
// not checked here.
#pragma once

#include <string>

#include "common/gemm_checks.h"

namespace sq {

// The layers of all experts in one tensor each, for rows of k values of x: weight [E, N, K] or packed.
inline GemmShape check_expert_layers(const char* op, const LayerNames& names, const Tensor& x, int64_t k,
                                     int64_t experts, const LayerTensors& layers) {
  const Tensor& weight = layers.weight;
  check_8bit(op, names.weight, weight.scalar_type());
  check_same_device(op, names.weight, weight, "x", x);
  check_same_device(op, names.scale, layers.scale, "x", x);
  GemmShape shape{0, 0, k, weight.dim() == 5};
  SQ_CHECK(weight.dim() == 3 || weight.dim() == 5, op, ": ", names.weight, " has shape ", shape_text(weight),
           ", expected [E, N, K] or what prepack_weight returns of it");
  SQ_CHECK(weight.size(0) == experts && experts > 0, op, ": ", names.weight, " has ", weight.size(0),
           " experts, expected ", experts > 0 ? "E=" + std::to_string(experts) + " as weight[0] has" : "at least one");
  check_scale_dtype(op, names.scale, layers.scale);
  const int64_t scales = layers.scale.numel();
  if (shape.is_packed) {
    SQ_CHECK(scales % experts == 0, op, ": ", names.scale, " has ", scales,
             " elements, expected as many for each of E=", experts, " experts");
    shape.n = scales / experts;
    check_packed(op, names, x, k, weight, shape.n);
  } else {
    shape.n = weight.size(1);
    SQ_CHECK(weight.size(2) == k, op, ": ", names.input, " has K=", k, ", but ", names.weight,
             " has K=", weight.size(2));
    SQ_CHECK(scales == experts || scales == experts * shape.n, op, ": ", names.scale, " has ", scales,
             " elements, expected E=", experts, " or E * N=", experts * shape.n);
  }
  check_exact_sums(op, weight, k);
  if (layers.bias.has_value()) {
    const Tensor& bias = *layers.bias;
    check_same_device(op, names.bias, bias, "x", x);
    check_float(op, names.bias, bias.scalar_type());
    SQ_CHECK(bias.numel() == experts * shape.n, op, ": ", names.bias, " has ", bias.numel(),
             " elements, expected E * N=", experts * shape.n);
  }
  return shape;
}

// Which experts each token of x [..., K] goes to, and their weights.
inline void check_top_k(const char* op, const Tensor& x, const Tensor& index, const Tensor& weights) {
  check_same_device(op, "top_k_index", index, "x", x);
  check_same_device(op, "top_k_weights", weights, "x", x);
  SQ_CHECK(index.scalar_type() == ScalarType::Long, op, ": top_k_index is ", dtype_text(index.scalar_type()),
           ", expected int64");
  check_float(op, "top_k_weights", weights.scalar_type());
  bool fits = index.dim() == x.dim();
  for (int64_t i = 0; fits && i + 1 < x.dim(); ++i) fits = index.size(i) == x.size(i);
  SQ_CHECK(fits, op, ": top_k_index has shape ", shape_text(index), " and x ", shape_text(x),
           ", expected [..., top k] and [..., K]");
  SQ_CHECK(shape_text(index) == shape_text(weights), op, ": top_k_weights has shape ", shape_text(weights),
           " and top_k_index ", shape_text(index), ", expected the same shape");
}

struct ExpertsShapes {
  int64_t tokens, top_k, experts;
  std::vector<GemmShape> layers;  // in their order
};

inline ExpertsShapes check_experts(const char* op, const Tensor& x, const Tensor& index, const Tensor& weights,
                                   const LayerLists& layers, const Rotations& rotate) {
  check_activation(op, x);
  check_top_k(op, x, index, weights);
  check_mlp_lists(op, layers);
  const int64_t experts = layers.weight[0].dim() > 0 ? layers.weight[0].size(0) : 0;
  const int64_t k = x.size(x.dim() - 1);
  const size_t down = layers.size() - 1;
  ExpertsShapes shapes{row_count(x), index.size(index.dim() - 1), experts, {}};
  const auto check = [&](size_t i, int64_t depth) {
    shapes.layers.push_back(check_expert_layers(op, mlp_names(layers, i), x, depth, experts, layers[i]));
  };
  for (size_t i = 0; i < down; ++i) check(i, k);
  const int64_t inner = shapes.layers[0].n;
  if (is_gated(layers)) {
    check_gate_and_up(op, mlp_names(layers, 0), layers[0], inner, mlp_names(layers, 1), layers[1], shapes.layers[1].n);
  }
  check(down, inner);
  check_mlp_rotations(op, layers, rotate, k, inner);
  return shapes;
}

}  // namespace sq
