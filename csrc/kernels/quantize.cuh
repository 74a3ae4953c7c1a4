// Quantization to 8 bits: q = round_half_even(x / scale), with one scale per row (per token) or one for all (static).
//
// Per token, each operation one fp32 operation:
//   v      = x, or x / smooth[column]
//   absmax = max |v| over the row
//   scale  = absmax / QMAX
//   q      = round(clamp(v * min(QMAX / absmax, FLT_MAX)))     the min keeps rows of subnormals from inf * 0
// A row of zeros has scale 1 and q = 0. A row with a non-finite v has scale NaN and q = 0, and no other row sees it.
//
// One block takes one row and its threads take groups of 8 neighbouring elements, so that x is read once and stays in
// registers between the maximum and the rounding. Bytes moved: rows * columns * (sizeof(T) + 1) + 4 * rows, plus smooth
// from L2. Rows too long for the registers are read twice, the second time mostly from L2.
//
// Static: q = round(clamp(x * (1 / scale))), 1 / scale one fp32 division. NaN gives 0 in INT8 and NaN in FP8.
#pragma once

#include "cpu/kernels/row_scale.h"
#include "kernels/round.cuh"

namespace sq {

constexpr int kGroup = 8;         // elements a thread moves at a time: 16 bytes of a 16-bit input
constexpr int kMaxThreads = 512;  // of a block

struct RowConfig {
  int threads;  // of the block
  int groups;   // that each thread keeps in registers: 1, 2, 4, 8; 0 for a row that is too long
};

// As few groups a thread as the row allows, so that short rows use few threads and long ones all of them.
constexpr RowConfig row_config(int64_t columns) {
  const int64_t groups = columns > 0 ? (columns + kGroup - 1) / kGroup : 1;
  if (groups <= kMaxThreads) return {static_cast<int>((groups + 31) / 32 * 32), 1};
  for (int kept = 2; kept <= 8; kept *= 2) {
    if (groups <= static_cast<int64_t>(kept) * kMaxThreads) return {kMaxThreads, kept};
  }
  return {kMaxThreads, 0};
}

template <typename T>
struct alignas(sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16) Group {
  T at[kGroup];
};

template <typename T>
bool is_group_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % alignof(Group<T>) == 0;
}

// Whether every row of `columns` elements can be moved in wide words.
template <typename T>
bool can_move_groups(const T* x, const float* smooth, const uint8_t* q, int64_t columns) {
  return columns % kGroup == 0 && is_group_aligned(x) && is_group_aligned(smooth) && is_group_aligned(q);
}

// values = x[first, first + kGroup), with `fill` past `end`.
template <typename T>
SQ_HOST_DEVICE inline void load_group(float (&values)[kGroup], const T* x, int64_t first, int64_t end, bool wide,
                                      float fill) {
  if (wide && first < end) {
    const Group<T> group = *reinterpret_cast<const Group<T>*>(x + first);
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) values[i] = to_float(group.at[i]);
    return;
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = first + i < end ? to_float(x[first + i]) : fill;
}

SQ_HOST_DEVICE inline void store_group(uint8_t* q, const Group<uint8_t>& group, int64_t first, int64_t end, bool wide) {
  if (wide && first < end) {
    *reinterpret_cast<Group<uint8_t>*>(q + first) = group;
    return;
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (first + i < end) q[first + i] = group.at[i];
  }
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

// Magnitudes are compared as bits: the order of the finite ones is kept, infinity is above them and NaN above infinity.
SQ_HOST_DEVICE inline uint32_t max_magnitude(uint32_t so_far, const float (&values)[kGroup]) {
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t magnitude = float_bits(values[i]) & ~kFloatSign;
    so_far = magnitude > so_far ? magnitude : so_far;
  }
  return so_far;
}

// The maximum over the block, in every thread of it.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warp_max[kMaxThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, value, offset);
    value = other > value ? other : value;
  }
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value = warp_max[warp] > value ? warp_max[warp] : value;
  return value;
}

template <DType kQ>
SQ_HOST_DEVICE inline Group<uint8_t> quantize_group(const float (&values)[kGroup], float multiplier) {
  Group<uint8_t> group;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) group.at[i] = round_to<kQ>(values[i] * multiplier);
  return group;
}

// The same, but a multiplier of 0 means q = 0 for infinities, NaN and the -0 of FP8 too.
template <DType kQ>
SQ_HOST_DEVICE inline Group<uint8_t> quantize_row_group(const float (&values)[kGroup], float multiplier) {
  return multiplier == 0.0f ? Group<uint8_t>{} : quantize_group<kQ>(values, multiplier);
}

// Grid: a block per row; threads and kGroups from row_config(columns); wide: can_move_groups of x, smooth and q.
template <typename T, DType kQ, int kGroups>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_per_token_kernel(const T* x, const float* smooth, uint8_t* q, float* scale, int64_t columns, bool wide) {
  const T* row = x + blockIdx.x * columns;
  uint8_t* q_row = q + blockIdx.x * columns;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kGroup;
  uint32_t magnitude = 0;

  if constexpr (kGroups > 0) {
    float values[kGroups][kGroup];
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      load_smoothed(values[g], row, smooth, begin + g * step, columns, wide);
      magnitude = max_magnitude(magnitude, values[g]);
    }
    const RowScale result = per_token_scale(block_max(magnitude), quantized_max(kQ));
    if (threadIdx.x == 0) scale[blockIdx.x] = result.scale;
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      store_group(q_row, quantize_row_group<kQ>(values[g], result.multiplier), begin + g * step, columns, wide);
    }
  } else {
    float values[kGroup];
    for (int64_t first = begin; first < columns; first += step) {
      load_smoothed(values, row, smooth, first, columns, wide);
      magnitude = max_magnitude(magnitude, values);
    }
    const RowScale result = per_token_scale(block_max(magnitude), quantized_max(kQ));
    if (threadIdx.x == 0) scale[blockIdx.x] = result.scale;
    for (int64_t first = begin; first < columns; first += step) {
      load_smoothed(values, row, smooth, first, columns, wide);
      store_group(q_row, quantize_row_group<kQ>(values, result.multiplier), first, columns, wide);
    }
  }
}

// Any grid and block: the threads step over x together. wide: x and q are aligned to groups.
template <typename T, DType kQ>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_static_kernel(const T* x, const float* scale, uint8_t* q, int64_t count, bool wide) {
  const float inverse = 1.0f / *scale;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroup;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup;
  float values[kGroup];
  for (int64_t first = begin; first < count; first += step) {
    load_group(values, x, first, count, wide && first + kGroup <= count, 0.0f);
    store_group(q, quantize_group<kQ>(values, inverse), first, count, wide && first + kGroup <= count);
  }
}

}  // namespace sq
