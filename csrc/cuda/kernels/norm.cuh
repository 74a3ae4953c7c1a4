// RMS norm and layer norm of rows, after an optional residual addition, quantized or not, every step one fp32 operation:
//   h    = x, or x + residual rounded to T, which is also stored
//   mean = 0 (RMS), or sum(h) / columns (layer norm)
//   v    = (h - mean) * (1 / sqrt(sum((h - mean)^2) / columns + eps)) * (weight + offset), + bias
// and then q and scale of v, or of v rounded to T, rotated or not, as in quantize.cuh, or v rounded to T itself. The sums
// have the order of cpu/kernels/norm_activation.h, 64 lanes that each take every 64th element: so the bits are those of
// the CPU kernels.
//
// One block takes one row. Its threads keep groups of 8 elements in registers, so that x is read once, and a copy of h in
// shared memory is what 64 threads sum. Bytes moved: rows * columns * (sizeof(T) + 1), with a residual
// rows * columns * (3 * sizeof(T) + 1); weight and bias come from L1 and L2. Rows too long for the registers, or
// not aligned, are read again from L2.
#pragma once

#include "cuda/kernels/group.cuh"

namespace sq {

// As many threads as the lanes of a sum at least, and two groups each where the row has so many: one block loads while
// others of the multiprocessor add.
struct NormConfig {
  int threads;
  int groups;  // that each thread keeps in registers: 1, 2, 4; 0 for a row that is read again
};

constexpr NormConfig norm_config(int64_t columns, bool wide) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  const int64_t threads = (groups + 63) / 64 * 32;
  NormConfig config{static_cast<int>(threads < kSumLanes     ? kSumLanes
                                     : threads > kMaxThreads ? kMaxThreads
                                                             : threads),
                    0};
  for (int kept = wide ? 1 : 8; kept <= 4; kept *= 2) {
    if (groups > static_cast<int64_t>(kept) * config.threads) continue;
    config.groups = kept;
    break;
  }
  return config;
}

template <typename T>
struct NormTask {
  const T *x, *residual;      // [rows, columns]; no residual: null
  T* sum;                     // x + residual
  const void *weight, *bias;  // [columns]; no bias: null
  DType weight_dtype, bias_dtype;
  float offset;  // added to the weight
  float eps;
  bool is_layer;
  int64_t columns;
  bool wide;             // can_move_groups of all pointers
  bool is_rounded;       // v is rounded to T before it is quantized
  Rotation rotation;     // of what is quantized
  QuantizedRows target;  // or
  T* y;                  // [rows, columns]
};

// The sum of h - mean, or of its squares, over a row; in every thread of the block.
template <bool kSquares, typename T>
__device__ __forceinline__ float lane_sum(const T* h, float mean, int64_t columns) {
  __shared__ float lanes[kSumLanes];
  __syncthreads();  // h is complete, and nobody reads the lanes of an earlier sum any more
  if (threadIdx.x < kSumLanes) {
    float sum = 0.0f;
    for (int64_t k = threadIdx.x; k < columns; k += kSumLanes) {
      const float value = to_float(h[k]) - mean;
      sum += kSquares ? value * value : value;
    }
    lanes[threadIdx.x] = sum;
  }
  __syncthreads();
  // Pairwise, by every warp for itself: exchanged sums of a pair have the same bits.
  static_assert(kSumLanes == 64, "two for each thread of a warp");
  float sum = lanes[threadIdx.x % 32] + lanes[threadIdx.x % 32 + 32];
  for (int offset = 16; offset > 0; offset /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// h of a group, stored where there is a residual.
template <typename T>
SQ_HOST_DEVICE inline Group<T> load_sum(const NormTask<T>& job, int64_t row, int64_t first, bool wide) {
  Group<T> h = load_raw(job.x + row * job.columns, first, job.columns, wide);
  if (job.residual == nullptr) return h;
  const Group<T> residual = load_raw(job.residual + row * job.columns, first, job.columns, wide);
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) from_float(to_float(h.at[i]) + to_float(residual.at[i]), &h.at[i]);
  store_group(job.sum + row * job.columns, h, first, job.columns, wide);
  return h;
}

// v of a group, 0 past the end of the row.
template <typename T>
SQ_HOST_DEVICE inline void normalize(float (&values)[kGroup], const NormTask<T>& job, const Group<T>& h, float mean,
                                     float gain, int64_t first, bool wide) {
  if (wide && first >= job.columns) {  // all of it or nothing
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) values[i] = 0.0f;
    return;
  }
  load_group(values, job.weight, job.weight_dtype, job.offset, first, job.columns, wide);
  float deviations[kGroup];
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) deviations[i] = to_float(h.at[i]);
  if (job.is_layer) {  // x - 0 is x
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) deviations[i] = deviations[i] - mean;
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = deviations[i] * gain * values[i];
  if (job.bias != nullptr) {
    float bias[kGroup];
    load_group(bias, job.bias, job.bias_dtype, -0.0f, first, job.columns, wide);
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) values[i] = values[i] + bias[i];
  }
  if (job.is_rounded) {
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) values[i] = rounded<T>(values[i]);
  }
  if (wide) return;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = first + i < job.columns ? values[i] : 0.0f;
}

template <typename T>
SQ_HOST_DEVICE inline void store_normalized(const NormTask<T>& job, int64_t row, int64_t first,
                                            const float (&values)[kGroup], bool wide) {
  Group<T> group;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) from_float(values[i], &group.at[i]);
  store_group(job.y + row * job.columns, group, first, job.columns, wide);
}

// Grid: a block per row; threads and kGroups from norm_config(columns, wide); shared memory for a row of T, unless kGroups is 0.
// What rotates is content with one block a multiprocessor: compilers that are not told keep to so few registers that they
// spill.
template <typename T, int kGroups, bool kQuantize, bool kRotates>
__global__ void __launch_bounds__(kMaxThreads, kRotates ? 1 : 0) norm_rows_kernel(NormTask<T> job) {
  SQ_DYNAMIC_SHARED(T, copy);
  const int64_t row = blockIdx.x, columns = job.columns;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kGroup;
  constexpr int kKept = kGroups > 0 ? kGroups : 1;
  Group<T> h[kKept];
  const T* summed = copy;
  if constexpr (kGroups > 0) {
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) h[g] = load_sum(job, row, begin + g * step, true);
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) store_group(copy, h[g], begin + g * step, columns, true);
  } else {
    summed = (job.residual == nullptr ? job.x : job.sum) + row * columns;
    if (job.residual != nullptr) {
      for (int64_t first = begin; first < columns; first += step) load_sum(job, row, first, job.wide);
    }
  }

  const float count = static_cast<float>(columns);
  const float mean = job.is_layer ? lane_sum<false>(summed, 0.0f, columns) / count : 0.0f;
  const float gain = 1.0f / sqrtf(lane_sum<true>(summed, mean, columns) / count + job.eps);

  if constexpr (kGroups > 0) {
    float values[kKept][kGroup];
    SQ_UNROLL
    for (int g = 0; g < kGroups; ++g) normalize(values[g], job, h[g], mean, gain, begin + g * step, true);
    if constexpr (kQuantize) {
      if constexpr (kRotates) {
        SQ_UNROLL
        for (int g = 0; g < kGroups; ++g) rotate_group(values[g], job.rotation);
      }
      uint32_t magnitude = 0;
      SQ_UNROLL
      for (int g = 0; g < kGroups; ++g) magnitude = max_magnitude(magnitude, values[g]);
      const RowScale result = row_scale(job.target, block_max(magnitude));
      if (threadIdx.x == 0) job.target.scale[row] = result.scale;
      SQ_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        store_quantized(job.target, row, columns, begin + g * step, values[g], result.multiplier, true);
      }
    } else {
      SQ_UNROLL
      for (int g = 0; g < kGroups; ++g) store_normalized(job, row, begin + g * step, values[g], true);
    }
  } else {
    float values[kGroup];
    uint32_t magnitude = 0;
    const int64_t end = end_of_steps<kRotates>(columns);
    for (int64_t first = begin; first < end; first += step) {
      normalize(values, job, load_raw(summed, first, columns, job.wide), mean, gain, first, job.wide);
      if constexpr (kRotates) rotate_group(values, job.rotation);
      if constexpr (kQuantize) {
        magnitude = max_magnitude(magnitude, values);
      } else {
        store_normalized(job, row, first, values, job.wide);
      }
    }
    if constexpr (kQuantize) {
      const RowScale result = row_scale(job.target, block_max(magnitude));
      if (threadIdx.x == 0) job.target.scale[row] = result.scale;
      for (int64_t first = begin; first < end; first += step) {
        normalize(values, job, load_raw(summed, first, columns, job.wide), mean, gain, first, job.wide);
        if constexpr (kRotates) rotate_group(values, job.rotation);
        store_quantized(job.target, row, columns, first, values, result.multiplier, job.wide);
      }
    }
  }
}

}  // namespace sq
