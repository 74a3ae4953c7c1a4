// Arguments of the ops that multiply, for every device.
#pragma once

#include <string>
#include <vector>

#include "rows_args.h"

namespace sq {

inline GemmShape check_w8a8_gemm(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                                 const OptionalTensor& bias, ScalarType out_dtype) {
  constexpr const char* kOp = "w8a8_gemm";
  check_operand_dtypes(kOp, a, b);
  const GemmShape shape = check_gemm(kOp, {}, a, b, b_scale, bias);
  check_same_device(kOp, "a_scale", a_scale, "a", a);
  check_scale(kOp, "a_scale", a_scale, "M", shape.m);
  check_float(kOp, "out_dtype", out_dtype);
  return shape;
}

inline GemmShape check_linear(const char* op, const Tensor& x, const Tensor& b, const Tensor& b_scale,
                              const OptionalTensor& bias, std::optional<ScalarType> out_dtype) {
  check_activation(op, x);
  const GemmShape shape = check_gemm(op, {"x", "b", "b_scale", "bias"}, x, b, b_scale, bias);
  check_float(op, "out_dtype", out_dtype.value_or(x.scalar_type()));
  return shape;
}

// Layers of one input; `bias` has as many or none.
inline std::vector<GemmShape> check_linears(const char* op, const Tensor& x, const std::vector<Tensor>& b,
                                            const std::vector<Tensor>& b_scale, const std::vector<Tensor>& bias,
                                            std::optional<ScalarType> out_dtype) {
  check_activation(op, x);
  SQ_CHECK(!b.empty(), op, ": b has no weights, expected at least one");
  SQ_CHECK(b_scale.size() == b.size(), op, ": b_scale has ", b_scale.size(), " tensors, but b has ", b.size());
  SQ_CHECK(bias.empty() || bias.size() == b.size(), op, ": bias has ", bias.size(), " tensors, but b has ", b.size());
  std::vector<GemmShape> shapes;
  for (size_t i = 0; i < b.size(); ++i) {
    const OptionalTensor own_bias = bias.empty() ? OptionalTensor() : OptionalTensor(bias[i]);
    shapes.push_back(check_linear(op, x, b[i], b_scale[i], own_bias, out_dtype));
    SQ_CHECK(b[i].scalar_type() == b[0].scalar_type(), op, ": b has weights of ", dtype_text(b[0].scalar_type()),
             " and ", dtype_text(b[i].scalar_type()), ", expected one dtype");
  }
  return shapes;
}

struct MlpShapes {
  GemmShape gate;
  std::optional<GemmShape> up;
  GemmShape down;
  Activation activation;
};

inline MlpShapes check_mlp(const char* op, const Tensor& x, const Tensor& gate, const Tensor& gate_scale,
                           const Tensor& down, const Tensor& down_scale, const OptionalTensor& up,
                           const OptionalTensor& up_scale, const OptionalTensor& gate_bias,
                           const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                           const std::string& activation) {
  check_activation(op, x);
  const GemmShape shape = check_gemm(op, {"x", "gate", "gate_scale", "gate_bias"}, x, gate, gate_scale, gate_bias);
  SQ_CHECK(up.has_value() == up_scale.has_value(), op, ": expected up and up_scale both or neither");
  SQ_CHECK(up.has_value() || !up_bias.has_value(), op, ": up_bias is given without up");
  std::optional<GemmShape> up_shape;
  if (up.has_value()) {
    up_shape = check_gemm(op, {"x", "up", "up_scale", "up_bias"}, x, *up, *up_scale, up_bias);
    SQ_CHECK(up_shape->n == shape.n, op, ": up has N=", up_shape->n, ", but gate has N=", shape.n);
    SQ_CHECK(up->scalar_type() == gate.scalar_type(), op, ": up is ", dtype_text(up->scalar_type()), ", but gate is ",
             dtype_text(gate.scalar_type()));
  }
  const OperandNames names{"act(gate)", "down", "down_scale", "down_bias"};
  const GemmShape down_shape = check_weight(op, names, x, shape.m, shape.n, down, down_scale, down_bias);
  return {shape, up_shape, down_shape, activation_kind(op, activation)};
}

}  // namespace sq
