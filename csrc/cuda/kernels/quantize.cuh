// Quantization to 8 bits: q = round_half_even(x / scale), with one scale per row (per token) or one for all (static).
//
// Per token, each operation one fp32 operation:
//   v      = x, or x / smooth[column], rotated in blocks where that is wanted, see group.cuh
//   absmax = max |v| over the row
//   scale  = absmax / QMAX
//   q      = round(clamp(v * min(QMAX / absmax, FLT_MAX)))     the min keeps rows of subnormals from inf * 0
// A row of zeros has scale 1 and q = 0. A row with a non-finite v has scale NaN and q = 0, and no other row sees it. Where
// rows have a static scale, it takes the place of absmax / QMAX in those that are finite.
//
// One block takes one row and its threads take groups of 8 neighbouring elements, so that x is read once and stays in
// registers between the maximum and the rounding. Bytes moved: rows * columns * (sizeof(T) + 1) + 4 * rows, plus smooth
// from L2. Rows too long for the registers, or not aligned, are read twice, the second time mostly from L2.
//
// Static: q = round(clamp(v * (1 / scale))), 1 / scale one fp32 division. NaN gives 0 in INT8 and NaN in FP8.
//
// Kernels that rotate are instances of their own: the others have no instruction and no register more for it.
#pragma once

#include "cuda/kernels/group.cuh"

namespace sq {

struct RowConfig {
  int threads;  // of the block
  int groups;   // that each thread keeps in registers: 1, 2, 4, 8; 0 for a row that is read twice
};

// As few groups a thread as the row allows, so that short rows use few threads and long ones all of them. What cannot be
// moved in wide words is read twice: then no branch stands between the loads of a thread, and all of them are under way
// before the first is used.
constexpr RowConfig row_config(int64_t columns, bool wide) {
  const int64_t groups = columns > 0 ? (columns + kGroup - 1) / kGroup : 1;
  const int threads = groups <= kMaxThreads ? static_cast<int>((groups + 31) / 32 * 32) : kMaxThreads;
  for (int kept = wide ? 1 : 16; kept <= 8; kept *= 2) {
    if (groups <= static_cast<int64_t>(kept) * kMaxThreads) return {threads, kept};
  }
  return {threads, 0};
}

// The row's values after smoothing.
template <typename T>
SQ_HOST_DEVICE inline void load_smoothed(float (&values)[kGroup], const T* row, const float* smooth, int64_t first,
                                         int64_t end, bool wide) {
  load_group(values, row, first, end, wide, 0.0f);
  if (smooth == nullptr) return;
  float divisors[kGroup];
  load_group(divisors, smooth, first, end, wide, 1.0f);
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = values[i] / divisors[i];
}

// Grid: a block per row; threads and kGroups from row_config(columns, wide); wide: can_move_groups of x, smooth and q.
template <typename T, int kGroups, bool kRotates>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_rows_kernel(const T* x, const float* smooth, QuantizedRows target, int64_t columns, bool wide,
                         Rotation rotation) {
  const int64_t row = blockIdx.x;
  const T* x_row = x + row * columns;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kGroup;
  uint32_t magnitude = 0;

  if constexpr (kGroups > 0) {
    float values[kGroups][kGroup];
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) load_smoothed(values[g], x_row, smooth, begin + g * step, columns, true);
    if constexpr (kRotates) {
      SQ_UNROLL
      for (int g = 0; g < kGroups; ++g) rotate_group(values[g], rotation);
    }
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) magnitude = max_magnitude(magnitude, values[g]);
    const RowScale result = row_scale(target, block_max(magnitude));
    if (threadIdx.x == 0) target.scale[row] = result.scale;
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      store_quantized(target, row, columns, begin + g * step, values[g], result.multiplier, true);
    }
  } else {
    float values[kGroup];
    const int64_t end = end_of_steps<kRotates>(columns);
    for (int64_t first = begin; first < end; first += step) {
      load_smoothed(values, x_row, smooth, first, columns, wide);
      if constexpr (kRotates) rotate_group(values, rotation);
      magnitude = max_magnitude(magnitude, values);
    }
    const RowScale result = row_scale(target, block_max(magnitude));
    if (threadIdx.x == 0) target.scale[row] = result.scale;
    for (int64_t first = begin; first < end; first += step) {
      load_smoothed(values, x_row, smooth, first, columns, wide);
      if constexpr (kRotates) rotate_group(values, rotation);
      store_quantized(target, row, columns, first, values, result.multiplier, wide);
    }
  }
}

// Any grid, blocks of whole warps: the threads step over x together. wide: x and q are aligned to groups. Blocks of a
// rotation divide rows, so that those of the whole x are the same.
template <typename T, bool kRotates>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_static_kernel(const T* x, const float* scale, uint8_t* q, DType dtype, int64_t count, bool wide,
                           Rotation rotation) {
  const float inverse = 1.0f / *scale;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroup;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup;
  const int64_t end = end_of_steps<kRotates>(count);
  float values[kGroup];
  for (int64_t first = begin; first < end; first += step) {
    const bool whole = wide && first + kGroup <= count;
    load_group(values, x, first, count, whole, 0.0f);
    if constexpr (kRotates) rotate_group(values, rotation);
    store_group(q, quantize_group<false>(values, inverse, dtype), first, count, whole);
  }
}

}  // namespace sq
