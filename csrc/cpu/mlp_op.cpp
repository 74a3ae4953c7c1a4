// w8a8_mlp on the CPU.
#include <torch/csrc/stable/library.h>

#include "gemm_args.h"
#include "mlp.h"
#include "op_string.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_mlp";

Tensor w8a8_mlp_cpu(const Tensor& x_in, const Tensor& gate_b, const Tensor& gate_scale, const Tensor& down_b,
                    const Tensor& down_scale, const OptionalTensor& up_b, const OptionalTensor& up_scale,
                    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                    const OptionalTensor& a_scale, const OptionalTensor& down_a_scale, const OpString& activation) {
  const MlpShapes shapes = check_mlp(kOp, x_in, gate_b, gate_scale, down_b, down_scale, up_b, up_scale, gate_bias,
                                     up_bias, down_bias, activation);
  const Mlp mlp{Weight(shapes.gate, gate_b, gate_scale, gate_bias),
                up_b.has_value() ? std::optional<Weight>(Weight(*shapes.up, *up_b, *up_scale, up_bias)) : std::nullopt,
                Weight(shapes.down, down_b, down_scale, down_bias),
                shapes.activation,
                checked_static_scale(kOp, "a_scale", a_scale, "x", x_in),
                checked_static_scale(kOp, "down_a_scale", down_a_scale, "x", x_in)};
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(replace_last(x, shapes.down.n), x.scalar_type());
  mlp.run(current_kernels(), x.const_data_ptr(), shapes.gate.m, kernel_dtype(x.scalar_type()), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cpu)); }

}  // namespace sq
