// rms_norm on the CPU.
#include <torch/csrc/stable/library.h>

#include "kernels/epilogue.h"
#include "parallel.h"
#include "torch_args.h"

namespace sq {
namespace {

Tensor rms_norm_cpu(const Tensor& x_in, const Tensor& weight_in, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_activation(kOp, x_in);
  const int64_t k = x_in.size(x_in.dim() - 1);
  check_same_device(kOp, "weight", weight_in, "x", x_in);
  check_float(kOp, "weight", weight_in.scalar_type());
  SQ_CHECK(weight_in.numel() == k, kOp, ": weight has ", weight_in.numel(), " elements, expected K=", k);
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());

  Scratch scratch(k * static_cast<int64_t>(sizeof(float)));
  auto* wide = reinterpret_cast<float*>(scratch.data());
  widen(weight.const_data_ptr(), kernel_dtype(weight.scalar_type()), static_cast<float>(offset), k, wide);
  RmsNormArgs args{};
  args.k = k;
  args.x = x.const_data_ptr();
  args.x_dtype = kernel_dtype(x.scalar_type());
  args.weight = wide;
  args.eps = static_cast<float>(eps);
  args.y = y.mutable_data_ptr();
  parallel_rms_norm(current_kernels().rms_norm_rows, args, row_count(x));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu)); }

}  // namespace sq
