// w8a8_mlp on the CPU.
#include <torch/csrc/stable/library.h>

#include "mlp.h"
#include "op_string.h"
#include "rows_args.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_mlp";
constexpr OperandNames kGateNames{"x", "gate", "gate_scale", "gate_bias"};
constexpr OperandNames kUpNames{"x", "up", "up_scale", "up_bias"};
constexpr OperandNames kDownNames{"act(gate)", "down", "down_scale", "down_bias"};

Tensor w8a8_mlp_cpu(const Tensor& x_in, const Tensor& gate_b, const Tensor& gate_scale, const Tensor& down_b,
                    const Tensor& down_scale, const OptionalTensor& up_b, const OptionalTensor& up_scale,
                    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                    const OptionalTensor& a_scale, const OptionalTensor& down_a_scale, const OpString& activation) {
  check_activation(kOp, x_in);
  const GemmShape shape = check_gemm(kOp, kGateNames, x_in, gate_b, gate_scale, gate_bias);
  const int64_t m = shape.m, inner = shape.n;
  SQ_CHECK(up_b.has_value() == up_scale.has_value(), kOp, ": expected up and up_scale both or neither");
  SQ_CHECK(up_b.has_value() || !up_bias.has_value(), kOp, ": up_bias is given without up");
  std::optional<Weight> up;
  if (up_b.has_value()) {
    const GemmShape up_shape = check_gemm(kOp, kUpNames, x_in, *up_b, *up_scale, up_bias);
    SQ_CHECK(up_shape.n == inner, kOp, ": up has N=", up_shape.n, ", but gate has N=", inner);
    SQ_CHECK(up_b->scalar_type() == gate_b.scalar_type(), kOp, ": up is ", dtype_text(up_b->scalar_type()),
             ", but gate is ", dtype_text(gate_b.scalar_type()));
    up.emplace(up_shape, *up_b, *up_scale, up_bias);
  }
  const GemmShape down_shape = check_weight(kOp, kDownNames, x_in, m, inner, down_b, down_scale, down_bias);
  const Mlp mlp{Weight(shape, gate_b, gate_scale, gate_bias),
                up,
                Weight(down_shape, down_b, down_scale, down_bias),
                activation_kind(kOp, activation),
                checked_static_scale(kOp, "a_scale", a_scale, "x", x_in),
                checked_static_scale(kOp, "down_a_scale", down_a_scale, "x", x_in)};
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(replace_last(x, down_shape.n), x.scalar_type());
  mlp.run(current_kernels(), x.const_data_ptr(), m, kernel_dtype(x.scalar_type()), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cpu)); }

}  // namespace sq
