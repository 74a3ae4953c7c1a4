// The last step of the portable kernels: scales, bias, cast, with one order of fp32 operations.
#pragma once

#include "gemm.h"

namespace sq {

inline float load_float(const void* source, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(source)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(source)[index]);
    default:
      return static_cast<const float*>(source)[index];
  }
}

// target[i] = source[i] + offset in fp32
inline void widen(const void* source, DType dtype, float offset, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = load_float(source, dtype, i) + offset;
}

inline void store_float(float value, void* target, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return from_float(value, static_cast<BFloat16*>(target) + index);
    case DType::kFloat16:
      return from_float(value, static_cast<Float16*>(target) + index);
    default:
      static_cast<float*>(target)[index] = value;
  }
}

// Writes y[row, first column .. first column + count) from that many sums.
inline void store_row(const GemmArgs& args, int64_t row, int64_t column, int64_t count, const float* sums) {
  const float a_scale = args.a_scale[row * args.a_scale_step];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = column + i;
    float value = sums[i] * (a_scale * args.b_scale[n * args.b_scale_step]);
    if (args.bias != nullptr) value += load_float(args.bias, args.bias_dtype, n);
    store_float(value, args.y, args.y_dtype, row * args.n + n);
  }
}

}  // namespace sq
