// prepack_weight, w8a8_gemm, w8a8_linear and w8a8_linear_group on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/gemm_checks.h"
#include "cpu/compute/packed_weight.h"
#include "cpu/compute/quantized_activation.h"

namespace sq {
namespace {

Tensor prepack_weight_cpu(const Tensor& weight) {
  check_plain_weight("prepack_weight", weight);
  return PackedWeight::packed(as_contiguous(weight));
}

Tensor w8a8_gemm_cpu(const Tensor& a_in, const Tensor& b, const Tensor& a_scale_in, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype) {
  const LayerTensors layer{b, b_scale, bias};
  const GemmShape shape = check_w8a8_gemm(a_in, a_scale_in, layer, out_dtype);
  const Tensor a = as_contiguous(a_in), a_scale = as_contiguous(a_scale_in);
  const PackedWeight weight(shape, layer);
  Tensor y = empty_cpu(replace_last(a, shape.n), out_dtype);

  Plan plan;
  QuantizedActivation activation(current_kernels(), shape.m, shape.k, weight.dtype(), plan);
  Scratch scratch(plan.bytes());
  activation.place(scratch);
  const auto* source = pointer<uint8_t>(a);
  parallel_rows(shape.m, shape.k, [&](Range rows) {
    copy_rows(source, shape.k, activation.flip(), activation.q(), activation.q_stride(), rows);
  });
  GemmArgs product = weight.product(y);
  product.a_scale = pointer<float>(a_scale);
  product.a_scale_step = a_scale.numel() == 1 ? 0 : 1;
  activation.multiply({product}, kernel_dtype(a.scalar_type()), shape.m);
  return y;
}

// Quantizes x once and multiplies it with every weight.
void quantize_and_multiply(const char* op, const Tensor& x_in, const OptionalTensor& smooth_in,
                           const OptionalTensor& input_scale, int64_t rotate, DType dtype,
                           const std::vector<GemmArgs>& products) {
  check_smooth(op, smooth_in, x_in);
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor smooth = as_contiguous(smooth_in);
  const int64_t m = row_count(x);
  const Kernels& kernels = current_kernels();
  Plan plan;
  QuantizedActivation activation(kernels, m, x.size(x.dim() - 1), dtype, plan);
  Scratch scratch(plan.bytes());
  activation.place(scratch);
  QuantizeArgs args = activation.target(checked_static_scale(op, "input_scale", input_scale, "x", x));
  args.x = x.const_data_ptr();
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.smooth = pointer<float>(smooth);
  parallel_quantize(kernels, args, rotate, m);
  activation.multiply(products, dtype, m);
}

Tensor w8a8_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                       const OptionalTensor& input_scale, const OptionalTensor& smooth,
                       std::optional<ScalarType> out_dtype, int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear";
  const LayerTensors layer{weight, weight_scale, bias};
  const GemmShape shape = check_linear(kOp, x, layer, out_dtype, rotate);
  const PackedWeight packed(shape, layer);
  Tensor y = empty_cpu(replace_last(x, shape.n), out_dtype.value_or(x.scalar_type()));
  quantize_and_multiply(kOp, x, smooth, input_scale, rotate, packed.dtype(), {packed.product(y)});
  return y;
}

std::vector<Tensor> w8a8_linear_group_cpu(const Tensor& x, const std::vector<Tensor>& weight,
                                          const std::vector<Tensor>& weight_scale, const OptionalTensors& bias,
                                          const OptionalTensor& input_scale, std::optional<ScalarType> out_dtype,
                                          int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear_group";
  const LayerLists layers{weight, weight_scale, bias};
  const std::vector<GemmShape> shapes = check_linear_group(kOp, x, layers, out_dtype, rotate);
  std::vector<PackedWeight> packed;
  std::vector<Tensor> outputs;
  std::vector<GemmArgs> products;
  for (size_t i = 0; i < layers.size(); ++i) {
    packed.emplace_back(shapes[i], layers[i]);
    outputs.push_back(empty_cpu(replace_last(x, shapes[i].n), out_dtype.value_or(x.scalar_type())));
    products.push_back(packed.back().product(outputs.back()));
  }
  quantize_and_multiply(kOp, x, std::nullopt, input_scale, rotate, packed.front().dtype(), products);
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight_cpu));
  m.impl("w8a8_gemm", TORCH_BOX(&w8a8_gemm_cpu));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear_cpu));
  m.impl("w8a8_linear_group", TORCH_BOX(&w8a8_linear_group_cpu));
}

}  // namespace sq
