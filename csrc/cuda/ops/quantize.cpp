// quantize_per_token and quantize_static on CUDA devices.
#include <torch/csrc/stable/library.h>

#include "cuda/compute/quantize.h"
#include "cuda/kernels/quantize.h"

namespace sq {

namespace {

Quantized quantize_per_token_cuda(const Tensor& x, ScalarType dtype, const OptionalTensor& smooth, int64_t rotate) {
  constexpr const char* kOp = "quantize_per_token";
  check_activation(kOp, x);
  check_8bit(kOp, "dtype", dtype);
  check_smooth(kOp, smooth, x);
  check_rotate(kOp, rotate, x.size(x.dim() - 1));
  const DeviceGuard guard(x.get_device_index());
  return quantize_rows_cuda(kOp, as_contiguous(x), smooth, nullptr, dtype, rotate);
}

Tensor quantize_static_cuda(const Tensor& x_in, const Tensor& scale, ScalarType dtype, int64_t rotate) {
  constexpr const char* kOp = "quantize_static";
  check_activation(kOp, x_in);
  check_8bit(kOp, "dtype", dtype);
  check_rotate(kOp, rotate, x_in.size(x_in.dim() - 1));
  const float* static_scale = static_scale_pointer(kOp, "scale", scale, "x", x_in);
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in);
  Tensor q = empty_like_device(x, shape_of(x), dtype);
  QuantizeStaticJob job{};
  job.x = x.const_data_ptr();
  job.scale = static_scale;
  job.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  job.count = x.numel();
  job.rotate = rotate;
  job.x_dtype = kernel_dtype(x.scalar_type());
  job.q_dtype = kernel_dtype(dtype);
  launch_quantize_static(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token_cuda));
  m.impl("quantize_static", TORCH_BOX(&quantize_static_cuda));
}

}  // namespace sq
