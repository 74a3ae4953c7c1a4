// What the kernels over rows share: groups of 8 neighbouring elements that a thread moves in 16-byte words, their
// rotation, the largest magnitude of a row, and its rounding.
#pragma once

#include <cmath>

#include "common/row_scale.h"
#include "cuda/kernels/quantized_rows.h"
#include "cuda/kernels/round.cuh"

// Shared memory of a size that the launch chooses, aligned to 16 bytes; the tests' shim has its own.
#ifdef __CUDACC__
#define SQ_DYNAMIC_SHARED(type, name)          \
  extern __shared__ uint4 sq_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(sq_dynamic_shared)
#endif

namespace sq {

constexpr int kGroup = 8;         // elements a thread moves at a time: 16 bytes of a 16-bit input
constexpr int kMaxThreads = 512;  // of a block

template <typename T>
struct alignas(sizeof(T) * kGroup < 16 ? sizeof(T) * kGroup : 16) Group {
  T at[kGroup];
};

template <typename T>
bool is_group_aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % alignof(Group<T>) == 0;
}

// Whether rows of `columns` elements can be moved in wide words, as far as these pointers go; null is nothing to move.
template <typename... T>
bool can_move_groups(int64_t columns, const T*... pointers) {
  return columns % kGroup == 0 && (is_group_aligned(pointers) && ...);
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

// The same of whatever float dtype, + offset.
SQ_HOST_DEVICE inline void load_group(float (&values)[kGroup], const void* x, DType dtype, float offset, int64_t first,
                                      int64_t end, bool wide) {
  switch (dtype) {
    case DType::kBFloat16:
      load_group(values, static_cast<const BFloat16*>(x), first, end, wide, 0.0f);
      break;
    case DType::kFloat16:
      load_group(values, static_cast<const Float16*>(x), first, end, wide, 0.0f);
      break;
    default:
      load_group(values, static_cast<const float*>(x), first, end, wide, 0.0f);
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = values[i] + offset;
}

// x[first, first + kGroup) as it is, with zeros past `end`.
template <typename T>
SQ_HOST_DEVICE inline Group<T> load_raw(const T* x, int64_t first, int64_t end, bool wide) {
  if (wide && first < end) return *reinterpret_cast<const Group<T>*>(x + first);
  Group<T> group{};
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (first + i < end) group.at[i] = x[first + i];
  }
  return group;
}

template <typename T>
SQ_HOST_DEVICE inline void store_group(T* x, const Group<T>& group, int64_t first, int64_t end, bool wide) {
  if (wide && first < end) {
    *reinterpret_cast<Group<T>*>(x + first) = group;
    return;
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (first + i < end) x[first + i] = group.at[i];
  }
}

// Blocks of values that are multiplied by Sylvester's Hadamard matrix over sqrt(their size), as hadamard_rows of
// cpu/kernels/norm_activation.h. They begin at multiples of their size, which is at most that of a warp's groups: so a
// block is within a warp.
struct Rotation {
  int threads;   // whose groups are a block
  float factor;  // 1 / sqrt(values of a block)
};

// block: a power of two from 2 * kGroup to 32 * kGroup, or 0 where nothing is rotated.
inline Rotation rotation_of(int64_t block) {
  if (block == 0) return {};
  return {static_cast<int>(block / kGroup), static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)))};
}

// Pairs (a, b) of values h apart become (a + b, a - b): for h = 1, 2, 4 both are in a group, then in those of two
// threads h / 8 apart. Every thread of the warp has to come here.
__device__ __forceinline__ void rotate_group(float (&values)[kGroup], const Rotation& rotation) {
  SQ_UNROLL
  for (int half = 1; half < kGroup; half *= 2) {
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      if ((i & half) != 0) continue;
      const float a = values[i], b = values[i + half];
      values[i] = a + b;
      values[i + half] = a - b;
    }
  }
  for (int apart = 1; apart < rotation.threads; apart *= 2) {
    const float sign = (threadIdx.x & static_cast<unsigned>(apart)) == 0 ? 1.0f : -1.0f;  // -1 where own is b
    SQ_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, values[i], apart);
      values[i] = __fmaf_rn(values[i], sign, other);  // a single rounding, as the product is exact
    }
  }
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) values[i] = values[i] * rotation.factor;
}

// Where a thread's steps over groups end: `end`, or, if the threads of a warp exchange values, where those of its first
// thread do. Past `end` there are zeros to rotate, and nothing to store.
template <bool kRotates>
__device__ __forceinline__ int64_t end_of_steps(int64_t end) {
  return kRotates ? end + threadIdx.x % 32 * kGroup : end;
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

// kNumbers: no product can be NaN, as none is in a row that is finite, unless a static scale is so small (under 2^-128) that
// its inverse overflows: then 0 becomes 127 here, and what is NaN elsewhere becomes the largest number.
template <DType kQ, bool kNumbers>
SQ_HOST_DEVICE inline Group<uint8_t> quantize_group(const float (&values)[kGroup], float multiplier) {
  Group<uint8_t> group;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const float value = values[i] * multiplier;
    group.at[i] = kNumbers ? round_number<kQ>(value) : round_to<kQ>(value);
  }
  return group;
}

// All threads take the same way: one branch for 8 elements costs less than three times as many kernels.
template <bool kNumbers>
SQ_HOST_DEVICE inline Group<uint8_t> quantize_group(const float (&values)[kGroup], float multiplier, DType dtype) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return quantize_group<DType::kFloat8E4M3, kNumbers>(values, multiplier);
    case DType::kFloat8E5M2:
      return quantize_group<DType::kFloat8E5M2, kNumbers>(values, multiplier);
    default:
      return quantize_group<DType::kInt8, kNumbers>(values, multiplier);
  }
}

// The scale of a row, from the bits of its largest magnitude: the static one where that is finite.
SQ_HOST_DEVICE inline RowScale row_scale(const QuantizedRows& target, uint32_t magnitude) {
  if (target.static_scale != nullptr && magnitude < kFloatInf)
    return {*target.static_scale, 1.0f / *target.static_scale};
  return per_token_scale(magnitude, quantized_max(target.dtype));
}

// A multiplier of 0 means q = 0 for infinities, NaN and the -0 of FP8 too.
SQ_HOST_DEVICE inline void store_quantized(const QuantizedRows& target, int64_t row, int64_t columns, int64_t first,
                                           const float (&values)[kGroup], float multiplier, bool wide) {
  if (first >= columns) return;
  const Group<uint8_t> group =
      multiplier == 0.0f ? Group<uint8_t>{} : quantize_group<true>(values, multiplier, target.dtype);
  store_group(target.q + row * columns, group, first, columns, wide);
}

}  // namespace sq
