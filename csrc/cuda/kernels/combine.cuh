// The last step of a mixture of experts, see CombineJob: each token's weighted sum of its experts' outputs.
//
// A thread has 8 neighbouring columns of a token. Bytes moved: 4 a value of x and sizeof(Y) a value of y.
#pragma once

#include <cmath>

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/experts.h"
#include "cuda/kernels/group.cuh"

namespace sq {

constexpr int kCombineThreads = kCombineColumns / kGroup;

// Grid: column_blocks for each token; wide: can_move_groups of x and y.
template <typename Y>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(CombineJob job, unsigned column_blocks, bool wide) {
  const int64_t token = blockIdx.x / column_blocks;
  const int64_t first = static_cast<int64_t>(blockIdx.x % column_blocks) * kCombineColumns + threadIdx.x * kGroup;
  if (first >= job.columns) return;
  float sums[kGroup] = {};
  for (int64_t slot = token * job.top_k; slot < (token + 1) * job.top_k; ++slot) {
    const int64_t expert = job.index[slot];
    if (expert == job.experts) continue;
    const bool is_expert = 0 <= expert && expert < job.experts;
    const float weight = is_expert ? load_float(job.weights, job.weights_dtype, slot) : NAN;
    float values[kGroup] = {};
    if (is_expert) load_group(values, job.x + slot * job.columns, first, job.columns, wide, 0.0f);
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) sums[i] = sums[i] + weight * values[i];
  }
  Group<Y> result;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) from_float(sums[i], &result.at[i]);
  store_group(static_cast<Y*>(job.y) + token * job.columns, result, first, job.columns, wide);
}

}  // namespace sq
