// The ops between the products on CUDA devices: rms_norm, and norms and activations that quantize what they compute.
#include <torch/csrc/stable/library.h>

#include "common/op_string.h"
#include "cuda/compute/devices.h"
#include "cuda/compute/quantize.h"

namespace sq {

Quantized activate_quantize_cuda(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                                 ScalarType dtype, const float* static_scale) {
  require_validated(op, Family::kRows, gate.get_device_index());
  QuantizeTarget target(gate, dtype, static_scale);
  ActivateJob job{};
  job.activation = activation;
  job.gate = gate.const_data_ptr();
  job.up = up.has_value() ? up->const_data_ptr() : nullptr;
  job.dtype = kernel_dtype(gate.scalar_type());
  job.rows = row_count(gate);
  job.columns = gate.size(gate.dim() - 1);
  job.target = target.rows;
  check_rows(op, job.rows);
  launch_activate_rows(job, shared_bytes(gate.get_device_index()), current_stream(gate));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {target.q, target.scale};
}

namespace {

// --- norms ----------------------------------------------------------------------------------------------------------

NormJob norm_job(const Tensor& x, const Tensor& weight, double eps, double offset) {
  NormJob job{};
  job.x = x.const_data_ptr();
  job.weight = weight.const_data_ptr();
  job.x_dtype = kernel_dtype(x.scalar_type());
  job.weight_dtype = kernel_dtype(weight.scalar_type());
  job.offset = static_cast<float>(offset);
  job.eps = static_cast<float>(eps);
  job.rows = row_count(x);
  job.columns = x.size(x.dim() - 1);
  return job;
}

void launch(const char* op, const NormJob& job, const Tensor& x) {
  check_rows(op, job.rows);
  launch_norm_rows(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor rms_norm_cuda(const Tensor& x_in, const Tensor& weight_in, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_norm(kOp, x_in, weight_in);
  require_validated(kOp, Family::kRows, x_in.get_device_index());
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  Tensor y = empty_like_device(x, shape_of(x), x.scalar_type());
  if (y.numel() == 0) return y;  // and has no address, which is how the kernel knows that it need not quantize
  NormJob job = norm_job(x, weight, eps, offset);
  job.y = y.mutable_data_ptr();
  launch(kOp, job, x);
  return y;
}

QuantizedSum norm_quantize(const char* op, bool is_layer, const Tensor& x_in, const Tensor& weight_in,
                           const OptionalTensor& bias_in, double eps, double offset, ScalarType dtype,
                           const OptionalTensor& residual_in, const OptionalTensor& scale) {
  check_norm_quantize(op, x_in, weight_in, bias_in, dtype, residual_in);
  const float* static_scale = static_scale_pointer(op, "scale", scale, "x", x_in);
  require_validated(op, Family::kRows, x_in.get_device_index());
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const OptionalTensor bias = as_contiguous(bias_in), residual = as_contiguous(residual_in);
  Tensor sum = empty_like_device(x, sum_shape(x, residual), x.scalar_type());
  QuantizeTarget target(x, dtype, static_scale);
  NormJob job = norm_job(x, weight, eps, offset);
  job.is_layer = is_layer;
  if (bias.has_value()) {
    job.bias = bias->const_data_ptr();
    job.bias_dtype = kernel_dtype(bias->scalar_type());
  }
  if (residual.has_value()) {
    job.residual = residual->const_data_ptr();
    job.sum = sum.mutable_data_ptr();
  }
  job.target = target.rows;
  launch(op, job, x);
  return {target.q, target.scale, sum};
}

QuantizedSum rms_norm_quantize_cuda(const Tensor& x, const Tensor& weight, double eps, ScalarType dtype,
                                    const OptionalTensor& residual, const OptionalTensor& scale, double offset) {
  return norm_quantize("rms_norm_quantize", false, x, weight, std::nullopt, eps, offset, dtype, residual, scale);
}

QuantizedSum layer_norm_quantize_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                                      ScalarType dtype, const OptionalTensor& residual, const OptionalTensor& scale) {
  return norm_quantize("layer_norm_quantize", true, x, weight, bias, eps, -0.0, dtype, residual, scale);
}

// --- activations ----------------------------------------------------------------------------------------------------

Quantized activate_quantize(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                            ScalarType dtype, const OptionalTensor& scale) {
  const char* name = check_activate_quantize(op, gate, up, dtype);
  const float* static_scale = static_scale_pointer(op, "scale", scale, name, gate);
  const DeviceGuard guard(gate.get_device_index());
  return activate_quantize_cuda(op, activation, as_contiguous(gate), as_contiguous(up), dtype, static_scale);
}

Quantized silu_mul_quantize_cuda(const Tensor& gate, const Tensor& up, ScalarType dtype, const OptionalTensor& scale) {
  return activate_quantize("silu_mul_quantize", Activation::kSilu, gate, up, dtype, scale);
}

Quantized gelu_mul_quantize_cuda(const Tensor& gate, const Tensor& up, ScalarType dtype, const OptionalTensor& scale,
                                 const OpString& approximate) {
  constexpr const char* kOp = "gelu_mul_quantize";
  return activate_quantize(kOp, gelu_kind(kOp, approximate), gate, up, dtype, scale);
}

Quantized gelu_quantize_cuda(const Tensor& x, ScalarType dtype, const OptionalTensor& scale,
                             const OpString& approximate) {
  constexpr const char* kOp = "gelu_quantize";
  return activate_quantize(kOp, gelu_kind(kOp, approximate), x, std::nullopt, dtype, scale);
}

Quantized relu_quantize_cuda(const Tensor& x, ScalarType dtype, const OptionalTensor& scale) {
  return activate_quantize("relu_quantize", Activation::kRelu, x, std::nullopt, dtype, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("rms_norm_quantize", TORCH_BOX(&rms_norm_quantize_cuda));
  m.impl("layer_norm_quantize", TORCH_BOX(&layer_norm_quantize_cuda));
  m.impl("silu_mul_quantize", TORCH_BOX(&silu_mul_quantize_cuda));
  m.impl("gelu_mul_quantize", TORCH_BOX(&gelu_mul_quantize_cuda));
  m.impl("gelu_quantize", TORCH_BOX(&gelu_quantize_cuda));
  m.impl("relu_quantize", TORCH_BOX(&relu_quantize_cuda));
}

}  // namespace sq
