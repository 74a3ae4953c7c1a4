// The quantizing steps: a target, a job, a launch.
#include "cuda/compute/quantize.h"

#include "cuda/compute/devices.h"
#include "cuda/kernels/norm_activation.h"
#include "cuda/kernels/quantize.h"

namespace sq {

Quantized quantize_rows_cuda(const char* op, const Tensor& x, const OptionalTensor& smooth, const float* static_scale,
                             ScalarType dtype) {
  const OptionalTensor divisors = as_contiguous(smooth);
  QuantizeTarget target(x, dtype, static_scale);
  QuantizeRowsJob job{};
  job.x = x.const_data_ptr();
  job.smooth = pointer<float>(divisors);
  job.target = target.rows;
  job.rows = row_count(x);
  job.columns = x.size(x.dim() - 1);
  job.x_dtype = kernel_dtype(x.scalar_type());
  check_rows(op, job.rows);
  launch_quantize_rows(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {target.q, target.scale};
}

Quantized activate_quantize_cuda(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                                 ScalarType dtype, const float* static_scale) {
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

}  // namespace sq
