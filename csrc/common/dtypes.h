// Element types of the kernels, and the bits of the narrow formats <-> fp32: round to nearest even, bit for bit as
// torch's .to(dtype). Free of branches, so that loops over them vectorize; the CUDA kernels use them too, with the GPU's
// own conversions where every GPU has one.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SQ_HOST_DEVICE __host__ __device__
#else
#define SQ_HOST_DEVICE
#endif

namespace sq {

enum class DType { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3, kFloat8E5M2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr uint32_t kFloatSign = 0x80000000;
constexpr uint32_t kFloatInf = 0x7f800000;

SQ_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SQ_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kBFloat16 || dtype == DType::kFloat16 ? 2 : 1;
}

// The largest magnitude that quantization produces.
SQ_HOST_DEVICE constexpr float quantized_max(DType dtype) {
  return dtype == DType::kFloat8E4M3 ? 448.0f : dtype == DType::kFloat8E5M2 ? 57344.0f : 127.0f;
}

SQ_HOST_DEVICE inline float to_float(float value) { return value; }

SQ_HOST_DEVICE inline float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

SQ_HOST_DEVICE inline float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
  float exact;
  asm("cvt.f32.f16 %0, %1;" : "=f"(exact) : "h"(value.bits));
  return exact;
#else
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float finite = float_from_bits(magnitude) * 0x1p112f;  // moves the exponent's bias, of subnormals too
  const uint32_t special = magnitude >= 0x0f800000 ? kFloatInf : 0;
  return float_from_bits(float_bits(finite) | special | static_cast<uint32_t>(value.bits & 0x8000) << 16);
#endif
}

SQ_HOST_DEVICE inline void from_float(float value, float* target) { *target = value; }

SQ_HOST_DEVICE inline void from_float(float value, BFloat16* target) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(target->bits) : "f"(value));
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  target->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
#endif
}

SQ_HOST_DEVICE inline void from_float(float value, Float16* target) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target->bits) : "f"(value));
#else
  const uint32_t sign = float_bits(value) >> 16 & 0x8000;
  const uint32_t magnitude = float_bits(value) & ~kFloatSign;
  // Below 2^-14, the sum with 0.5 lines the mantissa up with fp16's subnormal step, and rounds it.
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? 0x7c00 : result;  // 65520 and more round to infinity
  result = magnitude > kFloatInf ? 0x7e00 : result;
  target->bits = static_cast<uint16_t>(sign | result);
#endif
}

SQ_HOST_DEVICE inline float float8_e5m2_to_float(uint8_t bits) {
  return to_float(Float16{static_cast<uint16_t>(bits << 8)});
}

SQ_HOST_DEVICE inline float float8_e4m3_to_float(uint8_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7f) << 20;
  const float finite = float_from_bits(magnitude) * 0x1p120f;
  const uint32_t nan = (bits & 0x7f) == 0x7f ? 0x7fc00000 : 0;
  return float_from_bits(float_bits(finite) | nan | static_cast<uint32_t>(bits & 0x80) << 24);
}

// The two below take a NaN or a value within the format's finite range: quantization clamps first.
SQ_HOST_DEVICE inline uint8_t float_to_float8_e4m3(float value) {
  const uint32_t sign = float_bits(value) >> 24 & 0x80;
  const uint32_t magnitude = float_bits(value) & ~kFloatSign;
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0x1p14f) - float_bits(0x1p14f);
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  uint32_t result = magnitude < (121u << 23) ? subnormal : normal;
  result = magnitude > kFloatInf ? 0x7f : result;
  return static_cast<uint8_t>(sign | result);
}

SQ_HOST_DEVICE inline uint8_t float_to_float8_e5m2(float value) {
  const uint32_t sign = float_bits(value) >> 24 & 0x80;
  const uint32_t magnitude = float_bits(value) & ~kFloatSign;
  const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0x1p7f) - float_bits(0x1p7f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffff + (magnitude >> 21 & 1)) >> 21;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude > kFloatInf ? 0x7f : result;
  return static_cast<uint8_t>(sign | result);
}

}  // namespace sq
