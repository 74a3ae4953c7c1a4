// y = y + residual in fp32, rounded to T: the residual of a product that did not go through our epilogue.
//
// A thread takes 8 values; bytes moved: 3 * sizeof(T) a value.
#pragma once

#include "cuda/kernels/group.cuh"

namespace sq {

// Any grid and block. wide: y and residual are aligned to groups.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) add_kernel(T* y, const T* residual, int64_t count, bool wide) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroup;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup; first < count;
       first += step) {
    const bool whole = wide && first + kGroup <= count;
    Group<T> sum = load_raw(y, first, count, whole);
    const Group<T> other = load_raw(residual, first, count, whole);
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) from_float(to_float(sum.at[i]) + to_float(other.at[i]), &sum.at[i]);
    store_group(y, sum, first, count, whole);
  }
}

}  // namespace sq
