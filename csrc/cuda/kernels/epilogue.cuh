// The last step of the CUDA products: scales, bias and cast of int32 or fp32 sums, see Epilogue. Of one value, as the
// kernels call it that have their sums in registers, and a kernel for sums that are in memory.
//
// The kernel: a thread takes 4 neighbouring columns of a row, 16 bytes of sums; bytes moved: m * n * (4 * splits + sizeof(Y)).
// A product whose k was split has several sums, which are added here in their order. A residual is sizeof(Y) more.
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
struct ColumnEpilogue {
  float scale, bias;
  bool has_bias;
};

SQ_HOST_DEVICE inline ColumnEpilogue column_epilogue(const Epilogue& epilogue, int64_t column) {
  const bool has_bias = epilogue.bias != nullptr;
  return {epilogue.b_scale[column * epilogue.b_scale_step],
          has_bias ? load_float(epilogue.bias, epilogue.bias_dtype, column) : 0.0f, has_bias};
}

// The value of y in fp32. Adding no bias is not adding 0, which would change -0.
template <typename Sum>
SQ_HOST_DEVICE inline float epilogue_value(float a_scale, const ColumnEpilogue& column, Sum sum) {
  const float value = static_cast<float>(sum) * (a_scale * column.scale);
  return column.has_bias ? value + column.bias : value;
}

template <typename Sum>
SQ_HOST_DEVICE inline float epilogue_value(const Epilogue& epilogue, int64_t row, int64_t column, Sum sum) {
  return epilogue_value(epilogue.a_scale[row * epilogue.a_scale_step], column_epilogue(epilogue, column), sum);
}

// What is stored of a value: itself, or its sum with the residual, both of Y.
template <typename Y>
SQ_HOST_DEVICE inline Y finish_value(const Epilogue& epilogue, int64_t index, float value) {
  Y result;
  from_float(value, &result);
  if (epilogue.residual == nullptr) return result;
  from_float(to_float(result) + to_float(static_cast<const Y*>(epilogue.residual)[index]), &result);
  return result;
}

SQ_HOST_DEVICE inline void store_finished(const Epilogue& epilogue, int64_t index, float value) {
  switch (epilogue.y_dtype) {
    case DType::kBFloat16:
      static_cast<BFloat16*>(epilogue.y)[index] = finish_value<BFloat16>(epilogue, index, value);
      break;
    case DType::kFloat16:
      static_cast<Float16*>(epilogue.y)[index] = finish_value<Float16>(epilogue, index, value);
      break;
    default:
      static_cast<float*>(epilogue.y)[index] = finish_value<float>(epilogue, index, value);
  }
}

constexpr int kEpilogueThreads = 256;
constexpr int kEpilogueColumns = 4;  // of a thread

template <typename T>
struct alignas(sizeof(T) * kEpilogueColumns) Four {
  T at[kEpilogueColumns];
};

// Blocks that share a row.
constexpr int64_t epilogue_blocks(int64_t n) {
  constexpr int64_t kColumns = kEpilogueThreads * kEpilogueColumns;
  return (n + kColumns - 1) / kColumns;
}

// Grid: epilogue_blocks(n) for each row. wide: rows of sums and of y can be moved in fours.
template <typename Sum, typename Y>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_kernel(const Sum* sums, int splits, Epilogue epilogue, unsigned row_blocks, bool wide) {
  const int64_t row = blockIdx.x / row_blocks;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x % row_blocks) * kEpilogueThreads + threadIdx.x) * kEpilogueColumns;
  if (first >= epilogue.n) return;
  const Sum* source = sums + row * epilogue.n + first;
  const int64_t count = epilogue.m * epilogue.n;  // of a split
  Y* target = static_cast<Y*>(epilogue.y) + row * epilogue.n + first;
  if (wide) {
    Four<Sum> four = *reinterpret_cast<const Four<Sum>*>(source);
    for (int split = 1; split < splits; ++split) {
      const Four<Sum> more = *reinterpret_cast<const Four<Sum>*>(source + split * count);
      SQ_UNROLL
      for (int i = 0; i < kEpilogueColumns; ++i) four.at[i] += more.at[i];
    }
    Four<Y> result;
    SQ_UNROLL
    for (int i = 0; i < kEpilogueColumns; ++i) {
      result.at[i] =
          finish_value<Y>(epilogue, row * epilogue.n + first + i, epilogue_value(epilogue, row, first + i, four.at[i]));
    }
    *reinterpret_cast<Four<Y>*>(target) = result;
    return;
  }
  for (int i = 0; i < kEpilogueColumns && first + i < epilogue.n; ++i) {
    Sum sum = source[i];
    for (int split = 1; split < splits; ++split) sum += source[split * count + i];
    target[i] = finish_value<Y>(epilogue, row * epilogue.n + first + i, epilogue_value(epilogue, row, first + i, sum));
  }
}

}  // namespace sq
