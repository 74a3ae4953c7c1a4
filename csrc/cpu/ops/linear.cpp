// linear on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/tensors.h"
#include "cpu/compute/parallel.h"

namespace sq {
namespace {

constexpr const char* kOp = "linear";

void check_bf16(const char* name, const Tensor& tensor) {
  SQ_CHECK(tensor.scalar_type() == ScalarType::BFloat16, kOp, ": ", name, " is ", dtype_text(tensor.scalar_type()),
           ", expected bfloat16");
}

Tensor linear_cpu(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in) {
  check_bf16("x", x_in);
  check_bf16("weight", weight_in);
  SQ_CHECK(x_in.dim() >= 1, kOp, ": x has no dimensions, expected [..., K]");
  SQ_CHECK(weight_in.dim() == 2, kOp, ": weight has shape ", shape_text(weight_in), ", expected [N, K]");
  check_same_device(kOp, "weight", weight_in, "x", x_in);
  const int64_t n = weight_in.size(0), k = x_in.size(x_in.dim() - 1);
  SQ_CHECK(weight_in.size(1) == k, kOp, ": x has K=", k, ", but weight has K=", weight_in.size(1));
  if (bias_in.has_value()) {
    check_bf16("bias", *bias_in);
    check_same_device(kOp, "bias", *bias_in, "x", x_in);
    SQ_CHECK(bias_in->numel() == n, kOp, ": bias has ", bias_in->numel(), " elements, expected N=", n);
  }
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  Tensor y = empty_cpu(replace_last(x, n), ScalarType::BFloat16);
  LinearArgs args{};
  args.m = row_count(x);
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
