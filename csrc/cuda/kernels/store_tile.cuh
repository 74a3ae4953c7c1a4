// The end of the tensor-core products: scales, bias and cast of the sums that lie in the registers of a warp (see Epilogue),
// stored from there. Four neighbouring lanes store 8 neighbouring columns, two each: 16 bytes of a 16-bit row at a time,
// half a sector of L2.
#pragma once

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/row_map.cuh"
#include "cuda/kernels/tile_maps.h"

namespace sq {

template <typename Y>
struct alignas(2 * sizeof(Y)) Two {
  Y at[2];
};

// Two neighbouring values of y, of which the second may be past the last column.
template <typename Y>
__device__ __forceinline__ void store_two(void* y, int64_t index, bool is_pair, bool in_pairs, float first,
                                          float second) {
  Two<Y> two;
  from_float(first, &two.at[0]);
  from_float(second, &two.at[1]);
  Y* target = static_cast<Y*>(y) + index;
  if (in_pairs) {
    *reinterpret_cast<Two<Y>*>(target) = two;
    return;
  }
  target[0] = two.at[0];
  if (is_pair) target[1] = two.at[1];
}

// Sums of kM x kN fragments of 16 x 8, of which the first is that of y[row, column]. Rows and columns past the last are
// not stored. Types are told apart for each pair and not for all of them, which would be three times as much code. Rows: see
// row_map.cuh.
template <typename Sum, int kM, int kN, typename Rows>
__device__ __forceinline__ void store_tile(const Epilogue& epilogue, const Rows& rows, int64_t row, int64_t column,
                                           const Sum (&sums)[kM][kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const MatrixPlace own = fragment_c(lane, 0);
  constexpr int kHalf = fragment_c(0, 2).row;  // from the first two values of a fragment to the other two
  const int64_t pair_bytes = epilogue.y_dtype == DType::kFloat32 ? 8 : 4;
  const bool in_pairs = epilogue.n % 2 == 0 && reinterpret_cast<uintptr_t>(epilogue.y) % pair_bytes == 0;
  float row_scales[2 * kM];
  SQ_UNROLL
  for (int i = 0; i < 2 * kM; ++i) {
    const int64_t at = row + own.row + i * kHalf;
    row_scales[i] = at < epilogue.m ? epilogue.a_scale[rows.input(at) * epilogue.a_scale_step] : 0.0f;
  }
  SQ_UNROLL
  for (int j = 0; j < kN; ++j) {
    const int64_t first = column + own.column + j * 8;
    if (first >= epilogue.n) break;
    const bool is_pair = first + 1 < epilogue.n;
    const ColumnEpilogue left = column_epilogue(epilogue, first);
    const ColumnEpilogue right = is_pair ? column_epilogue(epilogue, first + 1) : left;
    SQ_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
      const int64_t at = row + own.row + i * kHalf;
      if (at >= epilogue.m) break;
      const float one = epilogue_value(row_scales[i], left, sums[i / 2][j][i % 2 * 2]);
      const float other = epilogue_value(row_scales[i], right, sums[i / 2][j][i % 2 * 2 + 1]);
      const int64_t index = rows.output(at) * epilogue.n + first;
      switch (epilogue.y_dtype) {
        case DType::kBFloat16:
          store_two<BFloat16>(epilogue.y, index, is_pair, in_pairs, one, other);
          break;
        case DType::kFloat16:
          store_two<Float16>(epilogue.y, index, is_pair, in_pairs, one, other);
          break;
        default:
          store_two<float>(epilogue.y, index, is_pair, in_pairs, one, other);
      }
    }
  }
}

// Leaves the sums of a product whose rows are the columns of y as they are, in sums of [m, n]: kN fragments of 16 weights
// by 8 tokens, of which the first is that of y[row, column]. 8 lanes store 32 bytes of a row.
template <typename Sum, int kN>
__device__ __forceinline__ void store_swapped_sums(Sum* target, int64_t m, int64_t n, int64_t row, int64_t column,
                                                   const Sum (&sums)[kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  SQ_UNROLL
  for (int i = 0; i < 4 * kN; ++i) {
    const MatrixPlace own = fragment_c(lane, i % 4);
    const int64_t token = row + i / 4 * 8 + own.column, weight = column + own.row;
    if (token < m && weight < n) target[token * n + weight] = sums[i / 4][i % 4];
  }
}

}  // namespace sq
