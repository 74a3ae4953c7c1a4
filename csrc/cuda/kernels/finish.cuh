// The last step of the CUDA products, and the decoding of fp8 in fours.
#pragma once

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/round.cuh"

namespace sq {

SQ_HOST_DEVICE inline float load_float(const void* x, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(x)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(x)[index]);
    default:
      return static_cast<const float*>(x)[index];
  }
}

// What the values of a column of y have in common.
struct ColumnFinish {
  float scale, bias;
  bool has_bias;
};

SQ_HOST_DEVICE inline ColumnFinish column_finish(const Finish& finish, int64_t column) {
  const bool has_bias = finish.bias != nullptr;
  return {finish.b_scale[column * finish.b_scale_step],
          has_bias ? load_float(finish.bias, finish.bias_dtype, column) : 0.0f, has_bias};
}

// The value of y in fp32. Adding no bias is not adding 0, which would change -0.
template <typename Sum>
SQ_HOST_DEVICE inline float finish_value(float a_scale, const ColumnFinish& column, Sum sum) {
  const float value = static_cast<float>(sum) * (a_scale * column.scale);
  return column.has_bias ? value + column.bias : value;
}

template <typename Sum>
SQ_HOST_DEVICE inline float finish_value(const Finish& finish, int64_t row, int64_t column, Sum sum) {
  return finish_value(finish.a_scale[row * finish.a_scale_step], column_finish(finish, column), sum);
}

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
