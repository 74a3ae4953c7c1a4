// quantize_per_token and quantize_static on CUDA devices.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "cpu/torch_args.h"
#include "cuda/launch.h"
#include "kernels/quantize.h"

namespace sq {
namespace {

std::tuple<Tensor, Tensor> quantize_per_token_cuda(const Tensor& x_in, ScalarType dtype,
                                                   const OptionalTensor& smooth_in) {
  constexpr const char* kOp = "quantize_per_token";
  require_unvalidated_is_wanted(kOp);
  check_activation(kOp, x_in);
  check_8bit(kOp, "dtype", dtype);
  check_smooth(kOp, smooth_in, x_in);
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor smooth = as_contiguous(smooth_in);
  Tensor q = torch::stable::new_empty(x, x.sizes(), dtype);
  Tensor scale = torch::stable::new_empty(x, drop_last(x), ScalarType::Float);

  QuantizePerToken job{};
  job.x = x.const_data_ptr();
  job.smooth = pointer<float>(smooth);
  job.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  job.scale = static_cast<float*>(scale.mutable_data_ptr());
  job.rows = row_count(x);
  job.columns = x.size(x.dim() - 1);
  job.x_dtype = kernel_dtype(x.scalar_type());
  job.q_dtype = kernel_dtype(dtype);
  SQ_CHECK(job.rows <= kMaxBlocks, kOp, ": x has ", job.rows, " rows, expected at most ", kMaxBlocks);
  launch_quantize_per_token(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {q, scale};
}

Tensor quantize_static_cuda(const Tensor& x_in, const Tensor& scale, ScalarType dtype) {
  constexpr const char* kOp = "quantize_static";
  require_unvalidated_is_wanted(kOp);
  check_activation(kOp, x_in);
  check_8bit(kOp, "dtype", dtype);
  check_same_device(kOp, "scale", scale, "x", x_in);
  check_static_scale(kOp, "scale", scale);  // not its value: looking at it would wait for the device
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in);
  Tensor q = torch::stable::new_empty(x, x.sizes(), dtype);

  QuantizeStatic job{};
  job.x = x.const_data_ptr();
  job.scale = pointer<float>(scale);
  job.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  job.count = x.numel();
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
