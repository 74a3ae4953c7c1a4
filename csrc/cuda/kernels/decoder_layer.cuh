// From the products of q, k, v to the attention of a decoder layer.
//
// append_kernel, of every head x of d elements, in its dtype T; each line is rounded to T, as of torch's single operators:
//   x = x * (1 / sqrt(sum(x^2) / d + eps)) * (weight + offset)       q and k, where they have norms
//   y = x * cos + (-x2, x1) * sin, each product rounded too           q and k; x1 and x2 are the halves of x
//   keys[slot] = y of k, values[slot] = v                             or their int8 and scale a head, see quantize.cuh
// and, in other blocks, the additive mask of the attention: 0 or -infinity.
//
// A warp takes a head. Its lanes take the same elements of both halves, so that both coordinates of a rotation are in one
// thread; 32 lanes read 64 or 128 neighbouring bytes. The sum has the order of norm.cuh: two lanes of it for a thread. An
// int8 head is computed twice, for its largest magnitude first, from L1. Bytes moved: what q, k and v are, twice; less of
// int8 caches; angles come from L2. Of the mask: a byte read and sizeof(T) written for every query and key.
//
// cache_copy_kernel: y = keys or values, dequantized to T, each head as often as queries share it; a thread takes 8
// elements. Bytes moved: the cache up to `length`, and copies * sizeof(T) an element.
#pragma once

#include "cuda/kernels/decoder_layer.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/group.cuh"

namespace sq {

constexpr int kAppendWarps = 4;
constexpr int kAppendThreads = 32 * kAppendWarps;

constexpr int64_t head_blocks(int64_t heads) { return (heads + kAppendWarps - 1) / kAppendWarps; }

SQ_HOST_DEVICE constexpr int64_t mask_groups(const MaskJob& mask, int64_t time) {
  return mask.y == nullptr ? 0 : mask.batches * mask.heads * time * (mask.step / kGroup);
}
constexpr int64_t mask_blocks(const MaskJob& mask, int64_t time) {
  return (mask_groups(mask, time) + kAppendThreads - 1) / kAppendThreads;
}

// --- heads ----------------------------------------------------------------------------------------------------------

// A head, and what becomes of its elements.
template <typename T>
struct Head {
  const T* x;
  HeadNorm norm;
  float offset;
  float gain;  // of the norm
  const T *cos, *sin;

  SQ_HOST_DEVICE float at(int64_t i) const {
    const float value = to_float(x[i]);
    return norm.weight == nullptr ? value
                                  : rounded<T>(value * gain * (load_float(norm.weight, norm.dtype, i) + offset));
  }
};

__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// 1 / sqrt(mean of squares + eps), in every lane.
template <typename T>
__device__ __forceinline__ float head_gain(const T* x, int64_t d, float eps) {
  static_assert(kSumLanes == 64, "two for each thread of a warp");
  float low = 0.0f, high = 0.0f;
  for (int64_t i = lane_of_warp(); i < d; i += kSumLanes) {
    const float value = to_float(x[i]);
    low += value * value;
    if (i + 32 >= d) break;
    const float other = to_float(x[i + 32]);
    high += other * other;
  }
  float sum = low + high;
  for (int offset = 16; offset > 0; offset /= 2) sum = sum + __shfl_xor_sync(0xffffffffu, sum, offset);
  return 1.0f / sqrtf(sum / static_cast<float>(d) + eps);
}

// visit(i, value) for the elements of a lane, rotated.
template <typename T, typename Visit>
__device__ __forceinline__ void visit_rotated(const Head<T>& head, int64_t d, const Visit& visit) {
  const int64_t half = d / 2;
  for (int64_t i = lane_of_warp(); i < half; i += 32) {
    const float first = head.at(i), second = head.at(i + half);
    T value;
    from_float(rounded<T>(first * to_float(head.cos[i])) + rounded<T>(-second * to_float(head.sin[i])), &value);
    visit(i, value);
    const int64_t other = i + half;
    from_float(rounded<T>(second * to_float(head.cos[other])) + rounded<T>(first * to_float(head.sin[other])), &value);
    visit(other, value);
  }
}

// Stores what `each` visits as a row of a cache.
template <typename T, typename Each>
__device__ __forceinline__ void store_in_cache(const CacheRows& cache, int64_t row, int64_t d, const Each& each) {
  if (cache.scale == nullptr) {
    T* y = static_cast<T*>(cache.data) + row * d;
    each([&](int64_t i, T value) { y[i] = value; });
    return;
  }
  uint32_t magnitude = 0;
  each([&](int64_t, T value) {
    const uint32_t own = float_bits(to_float(value)) & ~kFloatSign;
    magnitude = own > magnitude ? own : magnitude;
  });
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, magnitude, offset);
    magnitude = other > magnitude ? other : magnitude;
  }
  const RowScale result = per_token_scale(magnitude, quantized_max(DType::kInt8));
  if (lane_of_warp() == 0) cache.scale[row] = result.scale;
  uint8_t* q = static_cast<uint8_t*>(cache.data) + row * d;
  each([&](int64_t i, T value) {
    q[i] = result.multiplier == 0.0f ? 0 : round_number<DType::kInt8>(to_float(value) * result.multiplier);
  });
}

// The heads of a token are numbered: q, then k, then v.
template <typename T>
__device__ __forceinline__ void append_head(const AppendJob& job, int64_t token, int64_t number) {
  const int64_t d = job.d, batch = token / job.time, time = token % job.time;
  const int64_t slot = job.positions == nullptr ? job.past + time : job.positions[time];
  const bool is_q = number < job.heads, is_k = !is_q && number < job.heads + job.kv_heads;
  const CacheRows& cache = is_k ? job.keys : job.values;
  const bool has_room = slot >= 0 && slot < job.keys.room && slot < job.values.room;
  if (!is_q && !has_room) return;
  const HeadRows& rows = is_q ? job.q : is_k ? job.k : job.v;
  const int64_t own = is_q ? number : (number - job.heads) % job.kv_heads;
  const T* x = static_cast<const T*>(rows.x) + token * rows.step + own * d;
  const int64_t cache_row = (batch * job.kv_heads + own) * cache.room + slot;
  if (!is_q && !is_k) {
    store_in_cache<T>(cache, cache_row, d, [&](const auto& visit) {
      for (int64_t i = lane_of_warp(); i < d; i += 32) visit(i, x[i]);
    });
    return;
  }
  const int64_t angle = batch * job.angle_batch + time * d;
  Head<T> head{x,    is_q ? job.q_norm : job.k_norm,         job.norm_offset,
               0.0f, static_cast<const T*>(job.cos) + angle, static_cast<const T*>(job.sin) + angle};
  if (head.norm.weight != nullptr) head.gain = head_gain(x, d, job.eps);
  if (is_k) {
    store_in_cache<T>(cache, cache_row, d, [&](const auto& visit) { visit_rotated(head, d, visit); });
    return;
  }
  T* y = static_cast<T*>(job.rotated_q) + (token * job.heads + own) * d;
  // A token without a place in the cache must not get a result that looks like one.
  T nan;
  from_float(float_from_bits(0x7FC00000), &nan);
  visit_rotated(head, d, [&](int64_t i, T value) { y[i] = has_room ? value : nan; });
}

// --- mask -----------------------------------------------------------------------------------------------------------

// 8 neighbouring keys of a query.
template <typename T>
__device__ __forceinline__ void store_mask(const AppendJob& job, int64_t index) {
  const MaskJob& mask = job.mask;
  const int64_t row_groups = mask.step / kGroup;
  const int64_t row = index / row_groups, first = index % row_groups * kGroup;
  const int64_t query = row % job.time, head = row / job.time % mask.heads, batch = row / job.time / mask.heads;
  const int64_t slot = job.positions == nullptr ? job.past + query : job.positions[query];
  const int64_t end = mask.causal && slot + 1 < mask.length ? slot + 1 : mask.length;
  const int64_t* strides = mask.strides;
  const uint8_t* visible = mask.visible == nullptr
                               ? nullptr
                               : mask.visible + batch / mask.group * strides[0] + batch % mask.group * strides[1] +
                                     head * strides[2] + query * strides[3];
  Group<T> group;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const bool is_seen = first + i < end && (visible == nullptr || visible[(first + i) * strides[4]] != 0);
    from_float(is_seen ? 0.0f : -float_from_bits(kFloatInf), &group.at[i]);
  }
  store_group(static_cast<T*>(mask.y) + row * mask.step, group, first, mask.step, true);
}

// Grid: head_blocks of all heads of all tokens, then mask_blocks; kAppendThreads.
template <typename T>
__global__ void __launch_bounds__(kAppendThreads) append_kernel(AppendJob job, unsigned first_mask_block) {
  if (blockIdx.x >= first_mask_block) {
    const int64_t index = static_cast<int64_t>(blockIdx.x - first_mask_block) * kAppendThreads + threadIdx.x;
    if (index < mask_groups(job.mask, job.time)) store_mask<T>(job, index);
    return;
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  const int64_t of_token = job.heads + 2 * job.kv_heads;
  if (index < job.batch * job.time * of_token) append_head<T>(job, index / of_token, index % of_token);
}

// --- copies of a cache ----------------------------------------------------------------------------------------------

// 8 elements of a head of one token, as T.
template <typename T>
SQ_HOST_DEVICE inline Group<T> load_cached(const CacheRows& cache, int64_t row, int64_t first, int64_t d, bool wide) {
  if (cache.scale == nullptr) return load_raw(static_cast<const T*>(cache.data) + row * d, first, d, wide);
  const Group<uint8_t> q = load_raw(static_cast<const uint8_t*>(cache.data) + row * d, first, d, wide);
  const float scale = cache.scale[row];
  Group<T> group;
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    from_float(static_cast<float>(static_cast<int8_t>(q.at[i])) * scale, &group.at[i]);
  }
  return group;
}

// Groups of both copies together.
SQ_HOST_DEVICE constexpr int64_t copied_groups(const CacheCopyJob& job) {
  return 2 * job.batch * job.kv_heads * job.copies * job.length * ((job.d + kGroup - 1) / kGroup);
}

// Any grid and block. wide: d is a multiple of kGroup, and all memory is aligned to groups.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) cache_copy_kernel(CacheCopyJob job, bool wide) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t row_groups = (job.d + kGroup - 1) / kGroup, count = copied_groups(job) / 2;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < 2 * count; index += step) {
    const bool is_values = index >= count;
    const int64_t own = is_values ? index - count : index;
    const int64_t row = own / row_groups, first = own % row_groups * kGroup;  // of [batch, kv_heads, copies, length]
    const int64_t token = row % job.length, head = row / job.length / job.copies;
    const CacheRows& cache = is_values ? job.values : job.keys;
    T* y = static_cast<T*>(is_values ? job.y_values : job.y_keys) + row * job.d;
    store_group(y, load_cached<T>(cache, head * cache.room + token, first, job.d, wide), first, job.d, wide);
  }
}

}  // namespace sq
