// How cuBLASLt multiplies 8-bit matrices: a pure function of shape, dtypes and device, so that it can be tested without a
// GPU. y [m, n] of a [m, k] and b [n, k].
//
//   path    matrix product                            then                 where
//   kInt8   cuBLASLt int8 x int8 -> int32             epilogue.cuh         k % 16 == 0, n % 4 == 0
//   kOuter  cuBLASLt fp8 x fp8, scales and bias too   -                    sm_90
//   kFp8    cuBLASLt fp8 x fp8 -> fp32                epilogue.cuh         sm_89 and newer, k and n % 16 == 0
//   kWide   both widened to bf16, cuBLASLt -> fp32    epilogue.cuh         fp8 on older GPUs, and e5m2 x e5m2, which
//                                                                          cuBLASLt lacks; k and n % 8 == 0
//   kNone   -                                         -                    all else
//
// cuBLASLt speaks of column-major matrices: b is its A, transposed, [k, n]; a is its B [k, m]; y is its D [n, m], each
// without padding between columns. That is the one layout in which it takes 8-bit operands ("TN"). INT8 wants leading
// dimensions and n, k in multiples of 4, FP8 everything in multiples of 16 bytes; pointers in 16 bytes are faster for INT8
// too, hence k % 16 there. kOuter wants a vector of scales for each operand: one scale for all is repeated (scales.cuh).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>

#include "common/dtypes.h"

namespace sq {

// Sums in int32 or fp32 that are kept at a time: rows beyond are another product. Untuned; tests make it small.
#ifndef SQ_MOST_SUM_BYTES
#define SQ_MOST_SUM_BYTES (int64_t{256} << 20)
#endif
constexpr int64_t kMostSumBytes = SQ_MOST_SUM_BYTES;

struct GemmProblem {
  int arch;  // 90 for sm_90
  int64_t m, n, k;
  DType a, b, y;
  bool is_aligned;       // a and b begin at multiples of 16 bytes
  bool is_bias_aligned;  // and so does the bias
  bool has_bias;
  DType bias;
  bool is_fast;      // fp8 products are to be added with fewer bits
  int64_t l2_bytes;  // the device's cache
};

enum class GemmPath { kNone, kInt8, kOuter, kFp8, kWide };

enum class LtType { kInt8, kInt32, kFloat8E4M3, kFloat8E5M2, kBFloat16, kFloat16, kFloat32 };

// One product as cuBLASLt is asked for it; also what its choice of an algorithm is remembered by.
struct LtProduct {
  LtType a, b, d;                // in cuBLASLt's order: the weight, the activation, the result
  int64_t rows, columns, depth;  // of D: n, m; and k
  bool has_outer_scales, has_bias, is_fast;

  auto key() const { return std::tie(a, b, d, rows, columns, depth, has_outer_scales, has_bias, is_fast); }
  bool operator<(const LtProduct& other) const { return key() < other.key(); }
};

struct GemmPlan {
  GemmPath path;
  std::string reason;  // of kNone: why not
  LtProduct product;   // its columns, rows of y, are those of a chunk
  int64_t chunks;      // of rows, each a product of its own
};

struct Rows {
  int64_t begin, end;
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

// Why cuBLASLt takes no operands of this shape, or nothing.
inline std::string why_not_multiples(const GemmProblem& problem, int64_t n_step, int64_t k_step) {
  if (problem.k == 0 || problem.k % k_step != 0) {
    return "K is " + std::to_string(problem.k) + ", expected a positive multiple of " + std::to_string(k_step);
  }
  if (problem.n == 0 || problem.n % n_step != 0) {
    return "N is " + std::to_string(problem.n) + ", expected a positive multiple of " + std::to_string(n_step);
  }
  return "";
}

struct PathChoice {
  GemmPath path;
  std::string reason;  // of kNone
};

inline PathChoice choose_path(const GemmProblem& problem) {
  const bool is_int8 = problem.a == DType::kInt8;
  const bool is_e5m2 = problem.a == DType::kFloat8E5M2 && problem.b == DType::kFloat8E5M2;
  const bool is_wide = !is_int8 && (!has_fp8_hardware(problem.arch) || is_e5m2);
  if (problem.is_fast && (is_int8 || is_wide)) return {GemmPath::kNone, "only fp8 tensor cores add with fewer bits"};
  const int64_t n_step = is_int8 ? 4 : is_wide ? 8 : 16, k_step = is_wide ? 8 : 16;
  if (std::string reason = why_not_multiples(problem, n_step, k_step); !reason.empty()) {
    return {GemmPath::kNone, reason};
  }
  if (is_wide) return {GemmPath::kWide, ""};  // into aligned memory
  if (!problem.is_aligned) return {GemmPath::kNone, "an operand does not begin at a multiple of 16 bytes"};
  if (is_int8) return {GemmPath::kInt8, ""};
  // cuBLASLt adds a bias of the output's own 16-bit type only.
  const bool takes_bias =
      !problem.has_bias || (problem.bias == problem.y && problem.y != DType::kFloat32 && problem.is_bias_aligned);
  return {problem.arch == 90 && takes_bias ? GemmPath::kOuter : GemmPath::kFp8, ""};
}

// Bytes of sums in a chunk. Sums that stay in L2 save 8 bytes of memory traffic each, 4 written and 4 read, but every chunk
// reads the weight anew, n * k bytes for `cached` bytes of sums: so that it pays for n * k < 2 * cached.
inline int64_t most_sum_bytes(const GemmProblem& problem, int64_t element_bytes) {
  constexpr int64_t kLeast = int64_t{24} << 20, kMost = int64_t{32} << 20;
  const int64_t cached = std::clamp(problem.l2_bytes * 5 / 8, kLeast, kMost);
  const bool is_cached = static_cast<double>(problem.n) * static_cast<double>(problem.k * element_bytes) <
                         2.0 * static_cast<double>(cached);
  return std::min(kMostSumBytes, is_cached ? cached : kMostSumBytes);
}

constexpr int64_t kChunkRows = 16;  // what chunks begin at multiples of: tensor cores take no fewer

// Chunks of m rows, of at most so many bytes of sums each but for 256 rows, which are worth a product whatever they take.
inline int64_t chunks_of(int64_t m, int64_t n, int64_t most_bytes) {
  constexpr int64_t kSumBytes = 4, kLeastRows = 256;
  const int64_t most_rows = std::max(most_bytes / (kSumBytes * n) / kChunkRows * kChunkRows, kLeastRows);
  return (m + most_rows - 1) / most_rows;
}

// The rows of a chunk: all have as many, but for kChunkRows.
inline Rows chunk_rows(int64_t m, int64_t chunks, int64_t chunk) {
  const int64_t units = (m + kChunkRows - 1) / kChunkRows;
  return {units * chunk / chunks * kChunkRows, std::min(units * (chunk + 1) / chunks * kChunkRows, m)};
}

inline GemmPlan plan_path(const GemmProblem& problem, const PathChoice& choice) {
  GemmPlan plan{choice.path, choice.reason, {}, 1};
  LtProduct& product = plan.product;
  product.a = lt_type(problem.b);
  product.b = lt_type(problem.a);
  product.d = LtType::kFloat32;
  product.rows = problem.n;
  product.columns = problem.m;
  product.depth = problem.k;
  product.is_fast = problem.is_fast;
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
  if (plan.path == GemmPath::kNone || plan.path == GemmPath::kOuter) return plan;
  const int64_t element_bytes = plan.path == GemmPath::kWide ? 2 : 1;
  plan.chunks = chunks_of(problem.m, problem.n, most_sum_bytes(problem, element_bytes));
  return plan;
}

inline GemmPlan plan_gemm(const GemmProblem& problem) { return plan_path(problem, choose_path(problem)); }

// Where cuBLASLt has no algorithm for outer scales: scales and bias in a pass of their own.
inline GemmPlan plan_without_outer_scales(const GemmProblem& problem) {
  return plan_path(problem, {GemmPath::kFp8, ""});
}

// The bytes that cuBLASLt may use beside its operands: what NVIDIA recommends for each architecture.
inline int64_t lt_workspace_bytes(int arch) { return int64_t{arch >= 90 ? 32 : 4} << 20; }

}  // namespace sq
