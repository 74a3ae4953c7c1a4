// Rounding of fp32 to the 8-bit types, half to even, saturating: what every quantizing kernel ends with.
#pragma once

#include "common/dtypes.h"

#ifdef __CUDA_ARCH__
#define SQ_UNROLL _Pragma("unroll")
#else
#define SQ_UNROLL
#endif

namespace sq {

// To T and back.
template <typename T>
SQ_HOST_DEVICE inline float rounded(float value) {
  T narrow;
  from_float(value, &narrow);
  return to_float(narrow);
}

// Of a number; of a NaN any value within the limits.
SQ_HOST_DEVICE inline float clamp_number(float value, float limit) {
#ifdef __CUDA_ARCH__
  return fmaxf(fminf(value, limit), -limit);  // an instruction each
#else
  const float at_most = value > limit ? limit : value;
  return at_most < -limit ? -limit : at_most;
#endif
}

// The bits of a value within the limits in the 8-bit type. In FP8 it may be NaN.
template <DType kQuantized>
SQ_HOST_DEVICE inline uint8_t round_clamped(float clamped) {
  if constexpr (kQuantized == DType::kInt8) {
    // Adding 1.5 * 2^23 rounds to an integer, to nearest even, which is then in the low bits.
    constexpr float kRound = 12582912.0f;
    return static_cast<uint8_t>(float_bits(clamped + kRound));
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

// The bits of `value` in the 8-bit type. NaN becomes 0 in INT8 and stays NaN in FP8.
template <DType kQuantized>
SQ_HOST_DEVICE inline uint8_t round_to(float value) {
  const float of_nan = kQuantized == DType::kInt8 ? 0.0f : value;
  return round_clamped<kQuantized>(value == value ? clamp_number(value, quantized_max(kQuantized)) : of_nan);
}

// The same of a number, which takes fewer instructions.
template <DType kQuantized>
SQ_HOST_DEVICE inline uint8_t round_number(float value) {
  return round_clamped<kQuantized>(clamp_number(value, quantized_max(kQuantized)));
}

}  // namespace sq
