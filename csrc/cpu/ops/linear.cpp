// linear on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/linear_checks.h"
#include "common/tensors.h"
#include "cpu/compute/parallel.h"

namespace sq {
namespace {

Tensor linear_cpu(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in) {
  const LinearShape shape = check_bf16_linear(x_in, weight_in, bias_in);
  const int64_t n = shape.n, k = shape.k;
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  Tensor y = empty_cpu(replace_last(x, n), ScalarType::BFloat16);
  LinearArgs args{};
  args.m = shape.m;
  args.n = n;
  args.k = k;
  args.x = pointer<BFloat16>(x);
  args.w = pointer<BFloat16>(weight);
  args.bias = pointer<BFloat16>(bias);
  args.y = static_cast<BFloat16*>(y.mutable_data_ptr());
  const LinearColumns linear = current_kernels().linear.run;
  const int64_t blocks = div_up(n, kLinearColumns);
  const int64_t grain = std::max<int64_t>(1, kGemmGrain / std::max<int64_t>(1, args.m * k * kLinearColumns));
  if (args.m > 0 && n > 0) {
    torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      linear(args, {begin * kLinearColumns, std::min(n, end * kLinearColumns)});
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("linear", TORCH_BOX(&linear_cpu)); }

}  // namespace sq
