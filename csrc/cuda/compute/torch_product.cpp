// A call of sq::_gemm_by_torch through torch's dispatcher, which finds the implementation that Python registered.
#include "cuda/compute/torch_product.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

namespace sq {
namespace {

Tensor gemm_by_torch(const ProductJob& job, const Tensor& a, const Tensor& a_scale) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(a),           from(job.b),    from(a_scale),
                                    from(job.b_scale), from(job.bias), from(job.out_dtype)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("sq::_gemm_by_torch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows of a [..., C] as [rows, C].
Tensor row_slice(const Tensor& tensor, int64_t columns, const Rows& rows) {
  Tensor flat = torch::stable::view(tensor, {-1, columns});
  return torch::stable::narrow(flat, 0, rows.begin, rows.end - rows.begin);
}

}  // namespace

Refusal multiply_by_torch(ProductJob& job, const Rows& rows) {
  const int64_t m = row_count(job.a), n = job.pointers.epilogue.n;
  if (rows.begin == 0 && rows.end == m) {
    job.y = as_contiguous(gemm_by_torch(job, job.a, job.a_scale));
    add_residual(job.of_rows(rows).epilogue, job.a);
    return {};
  }
  const Tensor a = row_slice(job.a, job.pointers.k, rows);
  const bool has_one_scale = job.pointers.epilogue.a_scale_step == 0;
  const Tensor a_scale = has_one_scale ? job.a_scale : row_slice(job.a_scale, 1, rows);
  Tensor y = row_slice(job.result(), n, rows);
  torch::stable::copy_(y, gemm_by_torch(job, a, a_scale));
  add_residual(job.of_rows(rows).epilogue, job.a);
  return {};
}

}  // namespace sq
