// The last step of the kernels without AVX-512: scales, bias, cast, with one order of fp32 operations. Loops over one type
// at a time, which compilers vectorize, for the instruction set of the function that they are inlined into.
#pragma once

#include "cpu/kernels/gemm.h"

#define SQ_EPILOGUE_INLINE inline __attribute__((always_inline))

namespace sq {

template <class T>
void widen(const T* source, float offset, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]) + offset;
}

// target[i] = source[i] + offset in fp32
inline void widen(const void* source, DType dtype, float offset, int64_t count, float* target) {
  switch (dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(source), offset, count, target);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(source), offset, count, target);
    default:
      return widen(static_cast<const float*>(source), offset, count, target);
  }
}

// What the last step needs of the columns of a panel.
struct ColumnScales {
  int64_t first, count;
  float scale[kPanel];
  float bias[kPanel];

  ColumnScales(const GemmArgs& args, int64_t panel) : first(panel * kPanel) {
    count = args.n - first < kPanel ? args.n - first : kPanel;
    for (int64_t i = 0; i < count; ++i) scale[i] = args.b_scale[(first + i) * args.b_scale_step];
    if (args.bias == nullptr) return;
    const auto* source = static_cast<const uint8_t*>(args.bias) + first * element_size(args.bias_dtype);
    widen(source, args.bias_dtype, -0.0f, count, bias);  // x + -0 is x, also for x = -0
  }
};

template <class T>
SQ_EPILOGUE_INLINE void store_values(const float* values, int64_t count, void* y, int64_t index) {
  T* target = static_cast<T*>(y) + index;
  for (int64_t i = 0; i < count; ++i) from_float(values[i], target + i);
}

// Writes the panel's columns of y[row] from their sums, int32 or fp32.
template <class Sum>
SQ_EPILOGUE_INLINE void store_row(const GemmArgs& args, const ColumnScales& columns, int64_t row, const Sum* sums) {
  const float a_scale = args.a_scale[row * args.a_scale_step];
  const int64_t count = columns.count;
  float values[kPanel];
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(sums[i]) * (a_scale * columns.scale[i]);
  if (args.bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) values[i] += columns.bias[i];
  }
  const int64_t index = row * args.n + columns.first;
  switch (args.y_dtype) {
    case DType::kBFloat16:
      return store_values<BFloat16>(values, count, args.y, index);
    case DType::kFloat16:
      return store_values<Float16>(values, count, args.y, index);
    default:
      return store_values<float>(values, count, args.y, index);
  }
}

}  // namespace sq
