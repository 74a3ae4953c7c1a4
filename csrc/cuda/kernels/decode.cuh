// fp8 values as fp32, exactly: what precedes a product in fp32 or bf16.
#pragma once

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

}  // namespace sq
