// From a plan to cuBLASLt's products and what surrounds them.
#include "cuda/compute/library_product.h"

#include "cuda/compute/context.h"
#include "cuda/compute/cublaslt.h"
#include "cuda/compute/devices.h"
#include "cuda/kernels/gemm.h"

namespace sq {
namespace {

GemmProblem problem_of(const ProductJob& job, const TileJob& part, bool is_fast) {
  const Epilogue& epilogue = part.epilogue;
  GemmProblem problem{};
  problem.arch = device_arch(job.device());
  problem.m = epilogue.m;
  problem.n = epilogue.n;
  problem.k = part.k;
  problem.a = part.a_dtype;
  problem.b = part.b_dtype;
  problem.y = epilogue.y_dtype;
  problem.is_aligned = is_aligned(part.a) && is_aligned(part.b);
  problem.is_bias_aligned = is_aligned(epilogue.bias);
  problem.has_bias = epilogue.bias != nullptr;
  problem.bias = epilogue.bias_dtype;
  problem.is_fast = is_fast;
  problem.l2_bytes = l2_bytes(job.device());
  return problem;
}

Tensor widen(const uint8_t* q, DType dtype, int64_t count, const Tensor& like) {
  Tensor wide = empty_like_device(like, {count}, ScalarType::BFloat16);
  launch_widen({q, dtype, static_cast<BFloat16*>(wide.mutable_data_ptr()), count}, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return wide;
}

// The scales of both operands as vectors of one a row and one a column.
struct ScaleVectors {
  const float *a, *b;
  std::optional<Tensor> made;  // where they are, if they had to be made
};

ScaleVectors scale_vectors(const Epilogue& epilogue, const Tensor& like) {
  ScaleVectors vectors{epilogue.a_scale, epilogue.b_scale, std::nullopt};
  const bool has_a = epilogue.a_scale_step == 1 && is_aligned(epilogue.a_scale);
  const bool has_b = epilogue.b_scale_step == 1 && is_aligned(epilogue.b_scale);
  if (has_a && has_b) return vectors;
  const int64_t a_room = has_a ? 0 : (epilogue.m + 3) / 4 * 4, b_room = has_b ? 0 : epilogue.n;
  vectors.made = empty_like_device(like, {a_room + b_room}, ScalarType::Float);
  auto* room = static_cast<float*>(vectors.made->mutable_data_ptr());
  ScalesJob job{epilogue.a_scale, epilogue.b_scale, epilogue.a_scale_step, epilogue.b_scale_step, 0, 0,
                nullptr,          nullptr};
  if (!has_a) {
    vectors.a = job.a_vector = room;
    job.m = epilogue.m;
  }
  if (!has_b) {
    vectors.b = job.b_vector = room + a_room;
    job.n = epilogue.n;
  }
  launch_align_scales(job, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return vectors;
}

bool multiply_with_outer_scales(const char* op, const GemmPlan& plan, const TileJob& part, const Tensor& like) {
  const Epilogue& epilogue = part.epilogue;
  const ScaleVectors scales = scale_vectors(epilogue, like);
  if (!lt_multiply(op, plan.product, {part.b, part.a, scales.b, scales.a, epilogue.bias, epilogue.y}, like))
    return false;
  add_residual(epilogue, like);
  return true;
}

// Sums, then the epilogue, for each chunk of rows. Returns those that the library refuses, counted from the part's first.
std::vector<Rows> multiply_in_chunks(const char* op, const GemmPlan& plan, const TileJob& part, const Tensor& like) {
  const Epilogue& whole = part.epilogue;
  LtProduct product = plan.product;
  const bool is_int32 = product.d == LtType::kInt32, is_wide = plan.path == GemmPath::kWide;
  std::optional<Tensor> wide_a, wide_b;
  LtOperands operands{};
  operands.a = part.b;
  const uint8_t* a = part.a;
  if (is_wide) {
    wide_a = widen(part.a, part.a_dtype, whole.m * part.k, like);
    wide_b = widen(part.b, part.b_dtype, whole.n * part.k, like);
    a = pointer<uint8_t>(*wide_a);
    operands.a = wide_b->const_data_ptr();
  }
  const int64_t row_bytes = part.k * (is_wide ? 2 : 1);
  const int64_t most_rows = (whole.m + plan.chunks - 1) / plan.chunks + kChunkRows;
  Tensor sums =
      empty_like_device(like, {std::min(most_rows, whole.m), whole.n}, is_int32 ? ScalarType::Int : ScalarType::Float);
  operands.d = sums.mutable_data_ptr();
  std::vector<Rows> refused;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const Rows rows = chunk_rows(whole.m, plan.chunks, chunk);
    product.columns = rows.end - rows.begin;
    operands.b = a + rows.begin * row_bytes;
    if (!lt_multiply(op, product, operands, like)) {
      refused.push_back(rows);
      continue;
    }
    launch_epilogue({operands.d, 1, is_int32, epilogue_of_rows(whole, rows)}, current_stream(like));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return refused;
}

}  // namespace

Refusal multiply_by_library(ProductJob& job, const Rows& rows, bool is_fast) {
  const TileJob part = job.of_rows(rows);
  const GemmProblem problem = problem_of(job, part, is_fast);
  GemmPlan plan = plan_gemm(problem);
  if (plan.path == GemmPath::kNone) return {{rows}, plan.reason};
  make_context(job.device());
  if (plan.path == GemmPath::kOuter) {
    if (multiply_with_outer_scales(job.op, plan, part, job.a)) return {};
    plan = plan_without_outer_scales(problem);
  }
  Refusal refusal{multiply_in_chunks(job.op, plan, part, job.a), ""};
  for (Rows& refused : refusal.rows) {
    refusal.reason = "cuBLASLt has no algorithm for M=" + std::to_string(refused.end - refused.begin) +
                     ", N=" + std::to_string(problem.n) + " and K=" + std::to_string(problem.k);
    refused.begin += rows.begin;
    refused.end += rows.begin;
  }
  return refusal;
}

}  // namespace sq
