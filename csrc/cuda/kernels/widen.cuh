// fp8 values as bf16 in memory, exactly: what precedes a product in bf16. A thread takes 8 values; bytes moved: 3 a value.
#pragma once

#include "cuda/kernels/decode.cuh"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/group.cuh"

namespace sq {

// Any grid and block. wide: q and wide are aligned to groups.
__global__ void __launch_bounds__(kMaxThreads)
    widen_kernel(const uint8_t* q, DType dtype, BFloat16* wide, int64_t count, bool is_aligned) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroup;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup; first < count;
       first += step) {
    const bool whole = is_aligned && first + kGroup <= count;
    const Group<uint8_t> bytes = load_raw(q, first, count, whole);
    Group<BFloat16> result;
    SQ_UNROLL
    for (int w = 0; w < kGroup / 4; ++w) {
      uint32_t word = 0;
      SQ_UNROLL
      for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(bytes.at[4 * w + i]) << 8 * i;
      float values[4];
      decode_fp8(word, dtype, values);
      SQ_UNROLL
      for (int i = 0; i < 4; ++i) from_float(values[i], &result.at[4 * w + i]);
    }
    store_group(wide, result, first, count, whole);
  }
}

}  // namespace sq
