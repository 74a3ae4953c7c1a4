// fp8 values as fp32, or as bf16 in memory, exactly: what precedes a product in fp32 or bf16.
//
// Widening in memory: a thread takes 8 values; bytes moved: 3 a value.
#pragma once

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/group.cuh"
#include "cuda/kernels/round.cuh"

namespace sq {

// Four fp8 values as fp32, exactly.
SQ_HOST_DEVICE inline void decode_fp8(uint32_t word, DType dtype, float (&values)[4]) {
  if (dtype == DType::kFloat8E5M2) {
    SQ_UNROLL
    for (int i = 0; i < 4; ++i) values[i] = float8_e5m2_to_float(static_cast<uint8_t>(word >> 8 * i));
    return;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  SQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    uint32_t halves;  // the low byte becomes the low half
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(word >> 16 * i)));
    values[2 * i] = to_float(Float16{static_cast<uint16_t>(halves)});
    values[2 * i + 1] = to_float(Float16{static_cast<uint16_t>(halves >> 16)});
  }
#else
  SQ_UNROLL
  for (int i = 0; i < 4; ++i) values[i] = float8_e4m3_to_float(static_cast<uint8_t>(word >> 8 * i));
#endif
}

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
