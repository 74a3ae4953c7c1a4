// The scalar types of the quantize kernels: how each input type becomes fp32, and how fp32 becomes each 8-bit type.
// No torch header and no CUDA header: the native tests compile this file with a host compiler.
#pragma once

#include <cstdint>
#include <cstring>

namespace sq {

#ifdef __CUDACC__
#define SQ_DEVICE __host__ __device__ __forceinline__
#else
#define SQ_DEVICE inline
#endif

#ifdef __CUDA_ARCH__
#define SQ_UNROLL _Pragma("unroll")
#else
#define SQ_UNROLL
#endif

SQ_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

SQ_DEVICE float float_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

constexpr uint32_t kFloatInfinity = 0x7f800000u;  // as bits, and above it every NaN
constexpr float kFloatMax = 3.402823466e+38f;

// --- input types ----------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

SQ_DEVICE float to_float(float value) {
  return value;
}

SQ_DEVICE float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

SQ_DEVICE float to_float(Half value) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x7c00u << 13) return float_from_bits(sign | kFloatInfinity | magnitude);
  // Read as fp32 the exponent is 112 too small; a multiplication, unlike an addition to the exponent, also normalizes
  // the subnormals. It is exact.
  constexpr float kTwoTo112 = 5.192296858534828e+33f;
  return float_from_bits(sign | bits_of(float_from_bits(magnitude) * kTwoTo112));
#endif
}

// --- 8-bit types: the largest magnitude, and round_from(): round half to even, saturate
// --------------------------------

struct Int8 {
  static constexpr float kMax = 127.0f;

  // NaN becomes 0.
  static SQ_DEVICE uint8_t round_from(float value) {
    if (value != value) return 0;
    const float clamped = value < -kMax ? -kMax : (value > kMax ? kMax : value);
#ifdef __CUDA_ARCH__
    return static_cast<uint8_t>(__float2int_rn(clamped));
#else
    return static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(clamped)));
#endif
  }
};

// fp32 to an 8-bit float, for what is within its finite range: kBias is its exponent bias, kMantissa its mantissa's
// bits.
template <int kBias, int kMantissa>
SQ_DEVICE uint8_t encode_float8(uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kSmallestNormal = static_cast<uint32_t>(128 - kBias) << 23;
  if (magnitude < kSmallestNormal) {
    // Adding the power of two whose last place is the smallest subnormal lets the fp32 adder round.
    constexpr uint32_t kAligner = static_cast<uint32_t>(128 - kBias + kShift) << 23;
    return static_cast<uint8_t>(bits_of(float_from_bits(magnitude) + float_from_bits(kAligner)) - kAligner);
  }
  const uint32_t odd = (magnitude >> kShift) & 1u;
  const uint32_t rebias = static_cast<uint32_t>(127 - kBias) << 23;
  return static_cast<uint8_t>((magnitude - rebias + (1u << (kShift - 1)) - 1u + odd) >> kShift);
}

// NaN stays NaN; infinities saturate.
template <int kBias, int kMantissa, uint32_t kMaxBits>
SQ_DEVICE uint8_t round_to_float8(float value) {
  const uint32_t sign = bits_of(value) >> 31 << 7;
  uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > kFloatInfinity) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude > kMaxBits) magnitude = kMaxBits;
  return static_cast<uint8_t>(sign | encode_float8<kBias, kMantissa>(magnitude));
}

struct E4M3 {
  static constexpr float kMax = 448.0f;

  static SQ_DEVICE uint8_t round_from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return static_cast<uint8_t>(pair);
#else
    return round_to_float8<7, 3, 0x43e00000u>(value);
#endif
  }
};

struct E5M2 {
  static constexpr float kMax = 57344.0f;

  static SQ_DEVICE uint8_t round_from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(value));
    return static_cast<uint8_t>(pair);
#else
    return round_to_float8<15, 2, 0x47600000u>(value);
#endif
  }
};

}  // namespace sq
