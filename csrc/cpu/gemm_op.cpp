// prepack_weight, w8a8_gemm, w8a8_linear and w8a8_linears on the CPU.
#include <torch/csrc/stable/library.h>

#include "gemm_args.h"
#include "product.h"

namespace sq {
namespace {

Tensor prepack_weight_cpu(const Tensor& b) {
  check_plain_weight("prepack_weight", b);
  return Weight::packed(as_contiguous(b));
}

Tensor w8a8_gemm_cpu(const Tensor& a_in, const Tensor& b, const Tensor& a_scale_in, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype) {
  const GemmShape shape = check_w8a8_gemm(a_in, b, a_scale_in, b_scale, bias, out_dtype);
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

Tensor w8a8_linear_cpu(const Tensor& x, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias,
                       const OptionalTensor& a_scale, const OptionalTensor& smooth,
                       std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linear";
  const GemmShape shape = check_linear(kOp, x, b, b_scale, bias, out_dtype);
  const Weight weight(shape, b, b_scale, bias);
  Tensor y = empty_cpu(replace_last(x, shape.n), out_dtype.value_or(x.scalar_type()));
  quantize_and_multiply(kOp, x, smooth, a_scale, weight.dtype(), {weight.product(y)});
  return y;
}

std::vector<Tensor> w8a8_linears_cpu(const Tensor& x, const std::vector<Tensor>& b, const std::vector<Tensor>& b_scale,
                                     const std::vector<Tensor>& bias, const OptionalTensor& a_scale,
                                     std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linears";
  const std::vector<GemmShape> shapes = check_linears(kOp, x, b, b_scale, bias, out_dtype);
  std::vector<Weight> weights;
  std::vector<Tensor> outputs;
  std::vector<GemmArgs> products;
  for (size_t i = 0; i < b.size(); ++i) {
    const OptionalTensor own_bias = bias.empty() ? OptionalTensor() : OptionalTensor(bias[i]);
    weights.emplace_back(shapes[i], b[i], b_scale[i], own_bias);
    outputs.push_back(empty_cpu(replace_last(x, shapes[i].n), out_dtype.value_or(x.scalar_type())));
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
