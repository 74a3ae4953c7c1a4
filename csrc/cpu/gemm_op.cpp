// prepack_weight, w8a8_gemm, w8a8_linear and w8a8_linears on the CPU.
#include <torch/csrc/stable/library.h>

#include "product.h"

namespace sq {
namespace {

Tensor prepack_weight_cpu(const Tensor& b) {
  check_plain_weight("prepack_weight", b);
  return Weight::packed(as_contiguous(b));
}

Tensor w8a8_gemm_cpu(const Tensor& a_in, const Tensor& b, const Tensor& a_scale_in, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype) {
  constexpr const char* kOp = "w8a8_gemm";
  check_operand_dtypes(kOp, a_in, b);
  const GemmShape shape = check_gemm(kOp, {}, a_in, b, b_scale, bias);
  check_same_device(kOp, "a_scale", a_scale_in, "a", a_in);
  check_scale(kOp, "a_scale", a_scale_in, "M", shape.m);
  check_float(kOp, "out_dtype", out_dtype);
  const Tensor a = as_contiguous(a_in), a_scale = as_contiguous(a_scale_in);
  const Weight weight(shape, b, b_scale, bias);
  Tensor y = empty_cpu(replace_last(a, shape.n), out_dtype);

  Operand operand(current_kernels(), shape.m, shape.k, weight.dtype());
  Scratch scratch(operand.bytes());
  operand.place(scratch.data());
  const auto* source = pointer<uint8_t>(a);
  parallel_rows(shape.m, shape.k,
                [&](Range rows) { copy_rows(source, shape.k, operand.flip(), operand.q(), operand.q_stride(), rows); });
  GemmArgs product = weight.product(y);
  product.a_scale = pointer<float>(a_scale);
  product.a_scale_step = a_scale.numel() == 1 ? 0 : 1;
  operand.multiply({product}, kernel_dtype(a.scalar_type()), shape.m);
  return y;
}

// Quantizes x once and multiplies it with every weight.
void quantize_and_multiply(const char* op, const Tensor& x_in, const OptionalTensor& smooth_in,
                           const OptionalTensor& a_scale, DType dtype, const std::vector<GemmArgs>& products) {
  check_smooth(op, smooth_in, x_in);
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor smooth = as_contiguous(smooth_in);
  const int64_t m = row_count(x);
  const Kernels& kernels = current_kernels();
  Operand operand(kernels, m, x.size(x.dim() - 1), dtype);
  Scratch scratch(operand.bytes());
  operand.place(scratch.data());
  QuantizeArgs args = operand.target(checked_static_scale(op, "a_scale", a_scale, "x", x));
  args.x = x.const_data_ptr();
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.smooth = pointer<float>(smooth);
  parallel_quantize(kernels.quantize_rows, args, m);
  operand.multiply(products, dtype, m);
}

constexpr OperandNames kLinearNames{"x", "b", "b_scale", "bias"};

Tensor w8a8_linear_cpu(const Tensor& x, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias,
                       const OptionalTensor& a_scale, const OptionalTensor& smooth,
                       std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linear";
  check_activation(kOp, x);
  const GemmShape shape = check_gemm(kOp, kLinearNames, x, b, b_scale, bias);
  check_float(kOp, "out_dtype", out_dtype.value_or(x.scalar_type()));
  const Weight weight(shape, b, b_scale, bias);
  Tensor y = empty_cpu(replace_last(x, shape.n), out_dtype.value_or(x.scalar_type()));
  quantize_and_multiply(kOp, x, smooth, a_scale, weight.dtype(), {weight.product(y)});
  return y;
}

std::vector<Tensor> w8a8_linears_cpu(const Tensor& x, const std::vector<Tensor>& b, const std::vector<Tensor>& b_scale,
                                     const std::vector<Tensor>& bias, const OptionalTensor& a_scale,
                                     std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linears";
  check_activation(kOp, x);
  check_float(kOp, "out_dtype", out_dtype.value_or(x.scalar_type()));
  SQ_CHECK(!b.empty(), kOp, ": b has no weights, expected at least one");
  SQ_CHECK(b_scale.size() == b.size(), kOp, ": b_scale has ", b_scale.size(), " tensors, but b has ", b.size());
  SQ_CHECK(bias.empty() || bias.size() == b.size(), kOp, ": bias has ", bias.size(), " tensors, but b has ", b.size());
  std::vector<Weight> weights;
  std::vector<Tensor> outputs;
  std::vector<GemmArgs> products;
  for (size_t i = 0; i < b.size(); ++i) {
    const OptionalTensor own_bias = bias.empty() ? OptionalTensor() : OptionalTensor(bias[i]);
    const GemmShape shape = check_gemm(kOp, kLinearNames, x, b[i], b_scale[i], own_bias);
    SQ_CHECK(b[i].scalar_type() == b[0].scalar_type(), kOp, ": b has weights of ", dtype_text(b[0].scalar_type()),
             " and ", dtype_text(b[i].scalar_type()), ", expected one dtype");
    weights.emplace_back(shape, b[i], b_scale[i], own_bias);
    outputs.push_back(empty_cpu(replace_last(x, shape.n), out_dtype.value_or(x.scalar_type())));
    products.push_back(weights.back().product(outputs.back()));
  }
  quantize_and_multiply(kOp, x, std::nullopt, a_scale, weights.front().dtype(), products);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight_cpu));
  m.impl("w8a8_gemm", TORCH_BOX(&w8a8_gemm_cpu));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear_cpu));
  m.impl("w8a8_linears", TORCH_BOX(&w8a8_linears_cpu));
}

}  // namespace sq
