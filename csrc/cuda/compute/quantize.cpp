// The quantizing steps: a target, a job, a launch.
#include "cuda/compute/quantize.h"

#include "cuda/compute/devices.h"
#include "cuda/kernels/norm_activation.h"
#include "cuda/kernels/quantize.h"

namespace sq {

Quantized quantize_rows_cuda(const char* op, const Tensor& x, const OptionalTensor& smooth, const float* static_scale,
                             ScalarType dtype, int64_t rotate) {
  const OptionalTensor divisors = as_contiguous(smooth);
  QuantizeTarget target(x, dtype, static_scale);
  QuantizeRowsJob job{};
  job.x = x.const_data_ptr();
  job.smooth = pointer<float>(divisors);
  job.target = target.rows;
  job.rows = row_count(x);
  job.columns = x.size(x.dim() - 1);
  job.rotate = rotate;
  job.x_dtype = kernel_dtype(x.scalar_type());
  check_rows(op, job.rows);
  launch_quantize_rows(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {target.q, target.scale};
}

Quantized activate_quantize_cuda(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                                 ScalarType dtype, const float* static_scale, int64_t rotate) {
  QuantizeTarget target(gate, dtype, static_scale);
  ActivateJob job{};
  job.activation = activation;
  job.gate = gate.const_data_ptr();
  job.up = up.has_value() ? up->const_data_ptr() : nullptr;
  job.dtype = kernel_dtype(gate.scalar_type());
  job.rows = row_count(gate);
  job.columns = gate.size(gate.dim() - 1);
  job.row_step = gate.is_contiguous() ? job.columns : gate.stride(gate.dim() - 2);
  job.rotate = rotate;
  job.target = target.rows;
  check_rows(op, job.rows);
  launch_activate_rows(job, shared_bytes(gate.get_device_index()), current_stream(gate));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {target.q, target.scale};
}

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

void launch_norm(const char* op, const NormJob& job, const Tensor& x) {
  check_rows(op, job.rows);
  launch_norm_rows(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

QuantizedSum norm_quantize_cuda(const char* op, const NormQuantizeInputs& inputs, const float* static_scale,
                                bool is_rounded, int64_t rotate) {
  const Tensor x = as_contiguous(inputs.x), weight = as_contiguous(inputs.weight);
  const OptionalTensor bias = as_contiguous(inputs.bias), residual = as_contiguous(inputs.residual);
  Tensor sum = empty_like_device(x, sum_shape(x, residual), x.scalar_type());
  QuantizeTarget target(x, inputs.dtype, static_scale);
  NormJob job = norm_job(x, weight, inputs.eps, inputs.offset);
  job.is_layer = inputs.norm == Norm::kLayer;
  if (bias.has_value()) {
    job.bias = bias->const_data_ptr();
    job.bias_dtype = kernel_dtype(bias->scalar_type());
  }
  if (residual.has_value()) {
    job.residual = residual->const_data_ptr();
    job.sum = sum.mutable_data_ptr();
  }
  job.target = target.rows;
  job.is_rounded = is_rounded;
  job.rotate = rotate;
  launch_norm(op, job, x);
  return {target.q, target.scale, sum};
}

}  // namespace sq
