// Rounding of fp32 to the 8-bit types, half to even, saturating: what every quantizing kernel ends with.
#pragma once

#include "cpu/kernels/dtypes.h"

#ifdef __CUDA_ARCH__
#define SQ_UNROLL _Pragma("unroll")
#else
#define SQ_UNROLL
#endif

namespace sq {

// The bits of `value` in the 8-bit type. NaN becomes 0 in INT8 and stays NaN in FP8.
template <DType kQuantized>
SQ_HOST_DEVICE inline uint8_t round_to(float value) {
  constexpr float kMax = quantized_max(kQuantized);
  // A NaN fails both comparisons and stays.
  const float at_most = value > kMax ? kMax : value;
  const float clamped = at_most < -kMax ? -kMax : at_most;
  if constexpr (kQuantized == DType::kInt8) {
    // Adding 1.5 * 2^23 rounds to an integer, to nearest even, which is then in the low bits.
    constexpr float kRound = 12582912.0f;
    return static_cast<uint8_t>(float_bits((value == value ? clamped : 0.0f) + kRound));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    // The instruction converts two values; the second operand becomes the low byte.
    uint16_t pair;
    if constexpr (kQuantized == DType::kFloat8E4M3) {
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(clamped));
    } else {
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(clamped));
    }
    return static_cast<uint8_t>(pair);
#else
    return kQuantized == DType::kFloat8E4M3 ? float_to_float8_e4m3(clamped) : float_to_float8_e5m2(clamped);
#endif
  }
}

}  // namespace sq
