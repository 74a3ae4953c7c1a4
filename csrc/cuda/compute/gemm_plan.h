// How a product of 8-bit matrices is computed on a GPU: a pure function of its shape, dtypes and architecture, so that it
// can be tested without one. y [m, n] of a [m, k] and b [n, k].
//
//   path     matrix product                            then                 where
//   kSkinny  skinny.cuh, no tensor cores               -                    m <= 8, and all that the others refuse
//   kInt8    cuBLASLt int8 x int8 -> int32             epilogue.cuh         k % 16 == 0, n % 4 == 0
//   kOuter   cuBLASLt fp8 x fp8, scales and bias too   -                    sm_90, one scale a row and a column
//   kFp8     cuBLASLt fp8 x fp8 -> fp32                epilogue.cuh         sm_89 and newer, k and n % 16 == 0
//   kWide    both widened to bf16, cuBLASLt -> fp32    epilogue.cuh         fp8 on older GPUs, and e5m2 x e5m2, which
//                                                                           cuBLASLt lacks; k and n % 8 == 0
//
// cuBLASLt speaks of column-major matrices: b is its A, transposed, [k, n]; a is its B [k, m]; y is its D [n, m], each
// without padding between columns. That is the one layout in which it takes 8-bit operands ("TN"). INT8 wants leading
// dimensions and n, k in multiples of 4, FP8 everything in multiples of 16 bytes; pointers in 16 bytes are faster for INT8
// too, hence k % 16 there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "common/dtypes.h"

namespace sq {

constexpr int64_t kMostSkinnyRows = 8;
// Sums in int32 or fp32 that are kept at a time: rows beyond are another product. Untuned; tests make it small.
#ifndef SQ_MOST_SUM_BYTES
#define SQ_MOST_SUM_BYTES (int64_t{256} << 20)
#endif
constexpr int64_t kMostSumBytes = SQ_MOST_SUM_BYTES;

struct GemmProblem {
  int arch;  // 90 for sm_90
  int64_t m, n, k;
  DType a, b, y;
  bool is_aligned;               // a and b begin at multiples of 16 bytes
  bool are_vectors_aligned;      // and so do the scales and the bias
  bool a_per_row, b_per_column;  // scales; otherwise one for all
  bool has_bias;
  DType bias;
};

enum class GemmPath { kSkinny, kInt8, kOuter, kFp8, kWide };

enum class LtType { kInt8, kInt32, kFloat8E4M3, kFloat8E5M2, kBFloat16, kFloat16, kFloat32 };

// One product as cuBLASLt is asked for it; also what its choice of an algorithm is remembered by.
struct LtProduct {
  LtType a, b, d;                // in cuBLASLt's order: the weight, the activation, the result
  int64_t rows, columns, depth;  // of D: n, m; and k
  bool has_outer_scales, has_bias;

  auto key() const { return std::tie(a, b, d, rows, columns, depth, has_outer_scales, has_bias); }
  bool operator<(const LtProduct& other) const { return key() < other.key(); }
};

struct GemmPlan {
  GemmPath path;
  LtProduct product;      // of rows_together rows, the last one of fewer
  int64_t rows_together;  // of y
};

inline LtType lt_type(DType dtype) {
  switch (dtype) {
    case DType::kInt8:
      return LtType::kInt8;
    case DType::kFloat8E4M3:
      return LtType::kFloat8E4M3;
    case DType::kFloat8E5M2:
      return LtType::kFloat8E5M2;
    case DType::kBFloat16:
      return LtType::kBFloat16;
    case DType::kFloat16:
      return LtType::kFloat16;
    default:
      return LtType::kFloat32;
  }
}

inline bool has_fp8_hardware(int arch) { return arch >= 89; }

inline GemmPath choose_path(const GemmProblem& problem) {
  const int64_t n = problem.n, k = problem.k;
  if (problem.m <= kMostSkinnyRows || n == 0 || k == 0) return GemmPath::kSkinny;
  if (problem.a == DType::kInt8) {
    return problem.is_aligned && k % 16 == 0 && n % 4 == 0 ? GemmPath::kInt8 : GemmPath::kSkinny;
  }
  const bool is_e5m2 = problem.a == DType::kFloat8E5M2 && problem.b == DType::kFloat8E5M2;
  if (!has_fp8_hardware(problem.arch) || is_e5m2) {
    return k % 8 == 0 && n % 8 == 0 ? GemmPath::kWide : GemmPath::kSkinny;
  }
  if (!problem.is_aligned || k % 16 != 0 || n % 16 != 0) return GemmPath::kSkinny;
  // cuBLASLt adds a bias of the output's own 16-bit type only.
  const bool takes_bias = !problem.has_bias || (problem.bias == problem.y && problem.y != DType::kFloat32);
  const bool has_vectors = problem.a_per_row && problem.b_per_column && problem.are_vectors_aligned;
  const bool is_outer = problem.arch == 90 && has_vectors && takes_bias;
  return is_outer ? GemmPath::kOuter : GemmPath::kFp8;
}

inline GemmPlan plan_gemm(const GemmProblem& problem) {
  GemmPlan plan{};
  plan.path = choose_path(problem);
  plan.rows_together = problem.m;
  LtProduct& product = plan.product;
  product.a = lt_type(problem.b);
  product.b = lt_type(problem.a);
  product.d = LtType::kFloat32;
  product.rows = problem.n;
  product.depth = problem.k;
  switch (plan.path) {
    case GemmPath::kInt8:
      product.d = LtType::kInt32;
      break;
    case GemmPath::kOuter:
      product.d = lt_type(problem.y);
      product.has_outer_scales = true;
      product.has_bias = problem.has_bias;
      break;
    case GemmPath::kWide:
      product.a = product.b = LtType::kBFloat16;
      break;
    default:
      break;
  }
  if (plan.path != GemmPath::kOuter && plan.path != GemmPath::kSkinny) {
    constexpr int64_t kSumBytes = 4, kWholeTiles = 256;
    const int64_t most = kMostSumBytes / (kSumBytes * problem.n) / kWholeTiles * kWholeTiles;
    plan.rows_together = std::min(problem.m, std::max(most, kWholeTiles));
  }
  product.columns = plan.rows_together;
  return plan;
}

// What is left where cuBLASLt has no algorithm for a plan: without its outer scales, then without the library.
inline GemmPlan plan_without_algorithm(GemmProblem problem, const GemmPlan& refused) {
  if (refused.path == GemmPath::kOuter) {
    problem.are_vectors_aligned = false;
    return plan_gemm(problem);
  }
  GemmPlan plan{};
  plan.path = GemmPath::kSkinny;
  plan.rows_together = problem.m;
  return plan;
}

// The bytes that cuBLASLt may use beside its operands: what NVIDIA recommends for each architecture.
inline int64_t lt_workspace_bytes(int arch) { return int64_t{arch >= 90 ? 32 : 4} << 20; }

}  // namespace sq
