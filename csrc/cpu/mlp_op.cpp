// w8a8_mlp on the CPU.
#include <torch/csrc/stable/library.h>

#include "product.h"
#include "rows_args.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_mlp";
constexpr OperandNames kGateNames{"x", "gate", "gate_scale", "gate_bias"};
constexpr OperandNames kUpNames{"x", "up", "up_scale", "up_bias"};
constexpr OperandNames kDownNames{"act(gate)", "down", "down_scale", "down_bias"};

// Rows done together, so that what lies between the products stays within a cache that threads share.
int64_t rows_together(int64_t row_bytes) {
  constexpr int64_t kBytes = int64_t{16} << 20, kFewest = 64, kMost = 512;
  return std::clamp(kBytes / row_bytes / 32 * 32, kFewest, kMost);
}

Tensor w8a8_mlp_cpu(const Tensor& x_in, const Tensor& gate_b, const Tensor& gate_scale, const Tensor& down_b,
                    const Tensor& down_scale, const OptionalTensor& up_b, const OptionalTensor& up_scale,
                    const OptionalTensor& gate_bias, const OptionalTensor& up_bias, const OptionalTensor& down_bias,
                    const OptionalTensor& a_scale, const OptionalTensor& down_a_scale, std::string activation) {
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
  const Weight gate(shape, gate_b, gate_scale, gate_bias), down(down_shape, down_b, down_scale, down_bias);
  const float scale = checked_static_scale(kOp, "a_scale", a_scale, "x", x_in);
  const float inner_scale = checked_static_scale(kOp, "down_a_scale", down_a_scale, "x", x_in);
  const Activation kind = activation_kind(kOp, activation);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(replace_last(x, down.n()), x.scalar_type());

  const Kernels& kernels = current_kernels();
  const DType dtype = kernel_dtype(x.scalar_type());
  const int64_t element = element_size(dtype), products = up.has_value() ? 2 : 1;
  const int64_t block = std::min(m, rows_together(std::max<int64_t>(1, inner * (element * products + 1))));
  Operand input(kernels, block, shape.k, gate.dtype()), hidden(kernels, block, inner, down.dtype());
  const int64_t plane = Scratch::align(block * inner * element);
  Scratch scratch(input.bytes() + hidden.bytes() + products * plane);
  input.place(scratch.data());
  hidden.place(scratch.data() + input.bytes());
  uint8_t* planes = scratch.data() + input.bytes() + hidden.bytes();

  for (int64_t row = 0; row < m; row += block) {
    const int64_t rows = std::min(block, m - row);
    QuantizeArgs quantize = input.target(scale);
    quantize.x = static_cast<const uint8_t*>(x.const_data_ptr()) + row * shape.k * element;
    quantize.x_dtype = dtype;
    parallel_quantize(kernels.quantize_rows, quantize, rows);
    std::vector<GemmArgs> first = {gate.product(planes, dtype)};
    if (up.has_value()) first.push_back(up->product(planes + plane, dtype));
    input.multiply(first, gate.dtype(), rows);

    ActivateArgs source{};
    source.activation = kind;
    source.k = inner;
    source.gate = planes;
    source.up = up.has_value() ? planes + plane : nullptr;
    source.dtype = dtype;
    parallel_activate_quantize(kernels, source, hidden.target(inner_scale), rows);
    uint8_t* target = static_cast<uint8_t*>(y.mutable_data_ptr()) + row * down.n() * element;
    hidden.multiply({down.product(target, dtype)}, down.dtype(), rows);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cpu)); }

}  // namespace sq
