// The ops between the products on the CPU: rms_norm, and norms and activations that quantize what they compute.
#include <torch/csrc/stable/library.h>

#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "cpu/compute/parallel.h"
#include "cpu/kernels/epilogue.h"

namespace sq {
namespace {

// q [..., K] and scale [...] of what is in the shape of x, and the arguments of the quantizer that fills them.
struct QuantizeTarget {
  Tensor q, scale;
  QuantizeArgs args{};

  QuantizeTarget(const Tensor& x, ScalarType dtype, float static_scale)
      : q(empty_cpu(shape_of(x), dtype)), scale(empty_cpu(drop_last(x), ScalarType::Float)) {
    args.k = args.q_stride = x.size(x.dim() - 1);
    args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
    args.q_dtype = kernel_dtype(dtype);
    args.scale = static_cast<float*>(scale.mutable_data_ptr());
    args.static_scale = static_scale;
  }
};

// --- norms ----------------------------------------------------------------------------------------------------------

void widen_channels(const Tensor& values, double offset, float* target) {
  const Tensor contiguous = as_contiguous(values);
  widen(contiguous.const_data_ptr(), kernel_dtype(contiguous.scalar_type()), static_cast<float>(offset),
        contiguous.numel(), target);
}

Tensor rms_norm_cpu(const Tensor& x_in, const Tensor& weight, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_norm(kOp, x_in, weight);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());

  NormArgs args{};
  args.k = x.size(x.dim() - 1);
  Scratch scratch(args.k * static_cast<int64_t>(sizeof(float)));
  auto* wide = reinterpret_cast<float*>(scratch.data());
  widen_channels(weight, offset, wide);
  args.norm = Norm::kRms;
  args.x = x.const_data_ptr();
  args.x_dtype = args.y_dtype = kernel_dtype(x.scalar_type());
  args.weight = wide;
  args.eps = static_cast<float>(eps);
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t row_bytes = args.k * element_size(args.x_dtype);
  parallel_rows(row_count(x), row_bytes, [&](Range range) {
    NormArgs own = args;
    own.y = target + range.begin * row_bytes;
    current_kernels().norm_rows(own, range);
  });
  return y;
}

QuantizedSum norm_quantize(const char* op, Norm norm, const Tensor& x_in, const Tensor& weight,
                           const OptionalTensor& bias, double eps, double offset, ScalarType dtype,
                           const OptionalTensor& residual_in, const OptionalTensor& scale) {
  check_norm_quantize(op, x_in, weight, bias, dtype, residual_in);
  const float static_scale = checked_static_scale(op, "scale", scale, "x", x_in);
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor residual = as_contiguous(residual_in);
  Tensor sum = empty_cpu(sum_shape(x, residual), x.scalar_type());
  QuantizeTarget target(x, dtype, static_scale);

  NormArgs args{};
  args.k = target.args.k;
  Scratch scratch(2 * args.k * static_cast<int64_t>(sizeof(float)));
  auto* wide = reinterpret_cast<float*>(scratch.data());
  widen_channels(weight, offset, wide);
  if (bias.has_value()) widen_channels(*bias, -0.0, wide + args.k);  // x + -0 is x, also for x = -0
  args.norm = norm;
  args.x = x.const_data_ptr();
  args.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.weight = wide;
  args.bias = bias.has_value() ? wide + args.k : nullptr;
  args.eps = static_cast<float>(eps);
  args.sum = sum.mutable_data_ptr();
  args.y_dtype = DType::kFloat32;
  const Kernels& kernels = current_kernels();
  parallel_produce_quantize(kernels.quantize_rows, target.args, row_count(x), args.k * element_size(args.x_dtype),
                            [&](Range range, float* values) {
                              NormArgs own = args;
                              own.y = values;
                              kernels.norm_rows(own, range);
                            });
  return {target.q, target.scale, sum};
}

QuantizedSum rms_norm_quantize_cpu(const Tensor& x, const Tensor& weight, double eps, ScalarType dtype,
                                   const OptionalTensor& residual, const OptionalTensor& scale, double offset) {
  return norm_quantize("rms_norm_quantize", Norm::kRms, x, weight, std::nullopt, eps, offset, dtype, residual, scale);
}

QuantizedSum layer_norm_quantize_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                                     ScalarType dtype, const OptionalTensor& residual, const OptionalTensor& scale) {
  return norm_quantize("layer_norm_quantize", Norm::kLayer, x, weight, bias, eps, -0.0, dtype, residual, scale);
}

// --- activations ----------------------------------------------------------------------------------------------------

Quantized activate_quantize(const char* op, Activation activation, const Tensor& gate_in, const OptionalTensor& up_in,
                            ScalarType dtype, const OptionalTensor& scale) {
  const char* name = check_activate_quantize(op, gate_in, up_in, dtype);
  const float static_scale = checked_static_scale(op, "scale", scale, name, gate_in);
  const Tensor gate = as_contiguous(gate_in);
  const OptionalTensor up = as_contiguous(up_in);
  QuantizeTarget target(gate, dtype, static_scale);
  ActivateArgs args{};
  args.activation = activation;
  args.k = target.args.k;
  args.gate = gate.const_data_ptr();
  args.up = up.has_value() ? up->const_data_ptr() : nullptr;
  args.dtype = kernel_dtype(gate.scalar_type());
  parallel_activate_quantize(current_kernels(), args, target.args, row_count(gate));
  return {target.q, target.scale};
}

Quantized silu_mul_quantize_cpu(const Tensor& gate, const Tensor& up, ScalarType dtype, const OptionalTensor& scale) {
  return activate_quantize("silu_mul_quantize", Activation::kSilu, gate, up, dtype, scale);
}

Quantized gelu_mul_quantize_cpu(const Tensor& gate, const Tensor& up, ScalarType dtype, const OptionalTensor& scale,
                                const OpString& approximate) {
  constexpr const char* kOp = "gelu_mul_quantize";
  return activate_quantize(kOp, gelu_kind(kOp, approximate), gate, up, dtype, scale);
}

Quantized gelu_quantize_cpu(const Tensor& x, ScalarType dtype, const OptionalTensor& scale,
                            const OpString& approximate) {
  constexpr const char* kOp = "gelu_quantize";
  return activate_quantize(kOp, gelu_kind(kOp, approximate), x, std::nullopt, dtype, scale);
}

Quantized relu_quantize_cpu(const Tensor& x, ScalarType dtype, const OptionalTensor& scale) {
  return activate_quantize("relu_quantize", Activation::kRelu, x, std::nullopt, dtype, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize_cpu));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize_cpu));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize_cpu));
  m.impl("gelu_mul_quantize", TORCH_BOX(&gelu_mul_quantize_cpu));
  m.impl("gelu_quantize", TORCH_BOX(&gelu_quantize_cpu));
  m.impl("relu_quantize", TORCH_BOX(&relu_quantize_cpu));
}

}  // namespace sq
