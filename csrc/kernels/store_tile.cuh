// The end of the tensor-core products: scales, bias and cast of the sums that lie in the registers of a warp (see Finish),
// stored from there. Four neighbouring lanes store 8 neighbouring columns, two each: 16 bytes of a 16-bit row at a time,
// half a sector of L2.
#pragma once

#include "kernels/finish.cuh"
#include "kernels/tile_maps.h"

namespace sq {

template <typename Y>
struct alignas(2 * sizeof(Y)) Two {
  Y at[2];
};

// Sums of kM x kN fragments of 16 x 8, of which the first is that of y[row, column]. Rows and columns past the last are
// not stored.
template <typename Y, typename Sum, int kM, int kN>
__device__ __forceinline__ void store_tile_as(const Finish& finish, int64_t row, int64_t column,
                                              const Sum (&sums)[kM][kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const MatrixPlace upper = fragment_c(lane, 0), lower = fragment_c(lane, 2);
  const bool in_pairs = finish.n % 2 == 0 && reinterpret_cast<uintptr_t>(finish.y) % sizeof(Two<Y>) == 0;
  float row_scales[kM][2];
  SQ_UNROLL
  for (int i = 0; i < kM; ++i) {
    SQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t own = row + i * 16 + (half == 0 ? upper.row : lower.row);
      row_scales[i][half] = own < finish.m ? finish.a_scale[own * finish.a_scale_step] : 0.0f;
    }
  }
  SQ_UNROLL
  for (int j = 0; j < kN; ++j) {
    const int64_t first = column + j * 8 + upper.column;
    if (first >= finish.n) break;
    const bool is_pair = first + 1 < finish.n;
    const int64_t second = is_pair ? first + 1 : first;
    const ColumnFinish columns[2] = {column_finish(finish, first), column_finish(finish, second)};
    SQ_UNROLL
    for (int i = 0; i < kM; ++i) {
      SQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t own = row + i * 16 + (half == 0 ? upper.row : lower.row);
        if (own >= finish.m) continue;
        Two<Y> two;
        SQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          from_float(finish_value(row_scales[i][half], columns[e], sums[i][j][2 * half + e]), &two.at[e]);
        }
        Y* target = static_cast<Y*>(finish.y) + own * finish.n + first;
        if (in_pairs) {
          *reinterpret_cast<Two<Y>*>(target) = two;
        } else {
          target[0] = two.at[0];
          if (is_pair) target[1] = two.at[1];
        }
      }
    }
  }
}

template <typename Sum, int kM, int kN>
__device__ __forceinline__ void store_tile(const Finish& finish, int64_t row, int64_t column,
                                           const Sum (&sums)[kM][kN][4]) {
  switch (finish.y_dtype) {
    case DType::kBFloat16:
      return store_tile_as<BFloat16>(finish, row, column, sums);
    case DType::kFloat16:
      return store_tile_as<Float16>(finish, row, column, sums);
    default:
      return store_tile_as<float>(finish, row, column, sums);
  }
}

}  // namespace sq
