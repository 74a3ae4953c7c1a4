// Arguments of w8a8_experts.
#pragma once

#include <string>

#include "rows_args.h"

namespace sq {

// The weights of all experts in one tensor, for rows of k values of x: b [E, N, K] or packed.
inline GemmShape check_expert_weights(const char* op, const OperandNames& names, const Tensor& x, int64_t k,
                                      int64_t experts, const Tensor& b, const Tensor& b_scale,
                                      const OptionalTensor& bias) {
  check_8bit(op, names.b, b.scalar_type());
  check_same_device(op, names.b, b, "x", x);
  check_same_device(op, names.b_scale, b_scale, "x", x);
  GemmShape shape{0, 0, k, b.dim() == 5};
  SQ_CHECK(b.dim() == 3 || b.dim() == 5, op, ": ", names.b, " has shape ", shape_text(b),
           ", expected [E, N, K] or what prepack_weight returns of it");
  SQ_CHECK(b.size(0) == experts && experts > 0, op, ": ", names.b, " has ", b.size(0), " experts, expected ",
           experts > 0 ? "E=" + std::to_string(experts) + " as gate has" : "at least one");
  check_scale_dtype(op, names.b_scale, b_scale);
  const int64_t scales = b_scale.numel();
  if (shape.is_packed) {
    SQ_CHECK(scales % experts == 0, op, ": ", names.b_scale, " has ", scales,
             " elements, expected as many for each of E=", experts, " experts");
    shape.n = scales / experts;
    check_packed(op, names, x, k, b, shape.n);
  } else {
    shape.n = b.size(1);
    SQ_CHECK(b.size(2) == k, op, ": ", names.a, " has K=", k, ", but ", names.b, " has K=", b.size(2));
    SQ_CHECK(scales == experts || scales == experts * shape.n, op, ": ", names.b_scale, " has ", scales,
             " elements, expected E=", experts, " or E * N=", experts * shape.n);
  }
  check_exact_sums(op, b, k);
  if (bias.has_value()) {
    check_same_device(op, names.bias, *bias, "x", x);
    check_float(op, names.bias, bias->scalar_type());
    SQ_CHECK(bias->numel() == experts * shape.n, op, ": ", names.bias, " has ", bias->numel(),
             " elements, expected E * N=", experts * shape.n);
  }
  return shape;
}

struct ExpertsShapes {
  int64_t tokens, top_k, experts;
  GemmShape gate;
  std::optional<GemmShape> up;
  GemmShape down;
  Activation activation;
};

inline ExpertsShapes check_experts(const char* op, const Tensor& x, const Tensor& index, const Tensor& weights,
                                   const Tensor& gate, const Tensor& gate_scale, const Tensor& down,
                                   const Tensor& down_scale, const OptionalTensor& up, const OptionalTensor& up_scale,
                                   const OptionalTensor& gate_bias, const OptionalTensor& up_bias,
                                   const OptionalTensor& down_bias, const std::string& activation) {
  check_activation(op, x);
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

  const int64_t experts = gate.dim() > 0 ? gate.size(0) : 0;
  const int64_t k = x.size(x.dim() - 1);
  const GemmShape first =
      check_expert_weights(op, {"x", "gate", "gate_scale", "gate_bias"}, x, k, experts, gate, gate_scale, gate_bias);
  SQ_CHECK(up.has_value() == up_scale.has_value(), op, ": expected up and up_scale both or neither");
  SQ_CHECK(up.has_value() || !up_bias.has_value(), op, ": up_bias is given without up");
  std::optional<GemmShape> second;
  if (up.has_value()) {
    second = check_expert_weights(op, {"x", "up", "up_scale", "up_bias"}, x, k, experts, *up, *up_scale, up_bias);
    SQ_CHECK(second->n == first.n, op, ": up has N=", second->n, ", but gate has N=", first.n);
    SQ_CHECK(up->scalar_type() == gate.scalar_type(), op, ": up is ", dtype_text(up->scalar_type()), ", but gate is ",
             dtype_text(gate.scalar_type()));
  }
  const OperandNames names{"act(gate)", "down", "down_scale", "down_bias"};
  const GemmShape last = check_expert_weights(op, names, x, first.n, experts, down, down_scale, down_bias);
  return {row_count(x), index.size(index.dim() - 1), experts, first, second, last, activation_kind(op, activation)};
}

}  // namespace sq
