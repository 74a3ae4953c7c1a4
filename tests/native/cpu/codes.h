// Values of the 8-bit types for the tests of products: decoded by the definition of each format, and by chance.
#pragma once

#include "native/testing.h"

namespace sq {

inline float decode(uint8_t code, DType dtype) {
  if (dtype == DType::kInt8) return static_cast<float>(static_cast<int8_t>(code));
  const int mantissa_bits = dtype == DType::kFloat8E4M3 ? 3 : 2, bias = dtype == DType::kFloat8E4M3 ? 7 : 15;
  const int exponent = (code & 0x7f) >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
  const int top = (1 << (7 - mantissa_bits)) - 1;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                   : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  if (dtype == DType::kFloat8E4M3 && (code & 0x7f) == 0x7f) magnitude = NAN;
  if (dtype == DType::kFloat8E5M2 && exponent == top) magnitude = mantissa == 0 ? INFINITY : NAN;
  return static_cast<float>(code & 0x80 ? -magnitude : magnitude);
}

// A finite value.
inline uint8_t random_code(DType dtype) {
  for (;;) {
    const auto code = static_cast<uint8_t>(random_int(0, 255));
    if (std::isfinite(decode(code, dtype))) return code;
  }
}

inline Buffer<uint8_t> random_codes(int64_t count, DType dtype) {
  Buffer<uint8_t> codes(count);
  for (int64_t i = 0; i < count; ++i) codes[i] = random_code(dtype);
  return codes;
}

inline Buffer<float> random_scales(int64_t count) {
  Buffer<float> scales(count);
  for (int64_t i = 0; i < count; ++i) scales[i] = 0.01f * std::fabs(random_float()) + 1e-4f;
  return scales;
}

}  // namespace sq
