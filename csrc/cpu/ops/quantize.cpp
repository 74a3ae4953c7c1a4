// quantize_per_token and quantize_static on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/tensors.h"
#include "cpu/compute/parallel.h"
#include "cpu/kernels/dispatch.h"

namespace sq {
namespace {

std::tuple<Tensor, Tensor> quantize_per_token_cpu(const Tensor& x_in, ScalarType dtype, const OptionalTensor& smooth_in,
                                                  int64_t rotate) {
  constexpr const char* kOp = "quantize_per_token";
  check_activation(kOp, x_in);
  check_8bit(kOp, "dtype", dtype);
  check_smooth(kOp, smooth_in, x_in);
  check_rotate(kOp, rotate, x_in.size(x_in.dim() - 1));
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor smooth = as_contiguous(smooth_in);
  Tensor q = empty_cpu(shape_of(x), dtype);
  Tensor scale = empty_cpu(drop_last(x), ScalarType::Float);

  QuantizeArgs args{};
  args.k = x.size(x.dim() - 1);
  args.x = x.const_data_ptr();
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.smooth = pointer<float>(smooth);
  args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  args.q_stride = args.k;
  args.q_dtype = kernel_dtype(dtype);
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  parallel_quantize(current_kernels(), args, rotate, row_count(x));
  return {q, scale};
}

Tensor quantize_static_cpu(const Tensor& x_in, const Tensor& scale, ScalarType dtype, int64_t rotate) {
  constexpr const char* kOp = "quantize_static";
  check_activation(kOp, x_in);
  check_8bit(kOp, "dtype", dtype);
  check_rotate(kOp, rotate, x_in.size(x_in.dim() - 1));
  const float static_scale = checked_static_scale(kOp, "scale", scale, "x", x_in);
  const Tensor x = as_contiguous(x_in);
  Tensor q = empty_cpu(shape_of(x), dtype);

  QuantizeArgs args{};
  args.k = x.size(x.dim() - 1);
  args.x = x.const_data_ptr();
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
  args.q_stride = args.k;
  args.q_dtype = kernel_dtype(dtype);
  args.static_scale = static_scale;
  parallel_quantize(current_kernels(), args, rotate, row_count(x));
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token_cpu));
  m.impl("quantize_static", TORCH_BOX(&quantize_static_cpu));
}

}  // namespace sq
