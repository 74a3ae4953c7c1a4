// What a row of scores goes through: where its operands lie, which keys it may see, and the online softmax. Part of
// attention_body.h, which names the classes Simd and Packed.
#pragma once

#include <limits>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/scratch.h"

#define SQ_ATTENTION_INLINE inline __attribute__((always_inline)) SQ_ATTENTION_TARGET

namespace sq {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

SQ_ATTENTION_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
SQ_ATTENTION_INLINE const T* row_address(const void* base, const AttentionStrides& strides, int64_t batch, int64_t head,
                                         int64_t row) {
  return static_cast<const T*>(base) + batch * strides.batch + head * strides.head + row * strides.row;
}

template <class T>
SQ_ATTENTION_INLINE const T* query_address(const AttentionArgs& args, const AttentionTask& task, int64_t row) {
  return row_address<T>(args.q, args.q_strides, task.batch, task.kv_head * args.group + row % args.group,
                        task.queries.begin + row / args.group);
}

// Keys from the first on that the row of the task may see, the mask aside.
SQ_ATTENTION_INLINE int64_t visible_keys(const AttentionArgs& args, const AttentionTask& task, int64_t row) {
  if (!args.causal) return args.kv_len;
  const int64_t last = task.queries.begin + row / args.group + args.kv_len - args.q_len;
  return last < 0 ? 0 : smaller(last + 1, args.kv_len);
}

SQ_ATTENTION_INLINE void to_operand(float value, float* target) { *target = value; }
SQ_ATTENTION_INLINE void to_operand(BFloat16 value, float* target) { *target = to_float(value); }
SQ_ATTENTION_INLINE void to_operand(Float16 value, float* target) { *target = to_float(value); }
SQ_ATTENTION_INLINE void to_operand(BFloat16 value, uint16_t* target) { *target = value.bits; }
SQ_ATTENTION_INLINE void to_operand(int8_t value, float* target) { *target = value; }
SQ_ATTENTION_INLINE void to_operand(int8_t value, uint16_t* target) {  // exact: bf16 has 8 significant bits
  *target = static_cast<uint16_t>(float_bits(value) >> 16);
}

template <class T, class Operand>
SQ_ATTENTION_INLINE void copy_row(const T* source, int64_t count, int64_t padded, Operand* target) {
  for (int64_t i = 0; i < count; ++i) to_operand(source[i], target + i);
  for (int64_t i = count; i < padded; ++i) target[i] = 0;
}

// The transpose of a class Simd, word by word.
template <int kLanes>
SQ_ATTENTION_INLINE void transpose_words(const void* words, int64_t stride, int64_t count, void* target,
                                         int64_t target_stride) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < kLanes; ++j) {
      __builtin_memcpy(static_cast<uint8_t*>(target) + i * target_stride + 4 * j,
                       static_cast<const uint8_t*>(words) + j * stride + 4 * i, 4);
    }
  }
}

// Up to a vector of values; those beyond `count` are 0.
template <class Simd, class T>
SQ_ATTENTION_INLINE typename Simd::Vec widen_some(const T* source, int64_t count) {
  T padded[Simd::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = source[i];
  return Simd::widen(padded);
}

// s *= scale, element by element.
template <class Simd>
SQ_ATTENTION_INLINE void scale_scores(const float* scale, int64_t count, float* s) {
  int64_t j = 0;
  for (; j + Simd::kLanes <= count; j += Simd::kLanes) {
    const typename Simd::Vec product = Simd::widen(s + j) * Simd::widen(scale + j);
    __builtin_memcpy(s + j, &product, sizeof product);
  }
  for (; j < count; ++j) s[j] *= scale[j];
}

// --- softmax --------------------------------------------------------------------------------------------------------

// Cephes' polynomial for 2^r, |r| <= 1/2 (exp2f).
template <class Simd>
SQ_ATTENTION_INLINE typename Simd::Vec exp2_polynomial(typename Simd::Vec r) {
  using Vec = typename Simd::Vec;
  Vec p = Simd::multiply_add(Vec{} + 1.535336188319500e-4f, r, Vec{} + 1.339887440266574e-3f);
  p = Simd::multiply_add(p, r, Vec{} + 9.618437357674640e-3f);
  p = Simd::multiply_add(p, r, Vec{} + 5.550332471162809e-2f);
  p = Simd::multiply_add(p, r, Vec{} + 2.402264791363012e-1f);
  p = Simd::multiply_add(p, r, Vec{} + 6.931472028550421e-1f);
  return Simd::multiply_add(p, r, Vec{} + 1.0f);
}

constexpr float kRound =
    12582912.0f;  // 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits

// The exp2 of a class Simd, 2^n 2^r with n the nearest integer: of t <= 0; 0 below 2^-126. A NaN stays.
template <class Simd>
SQ_ATTENTION_INLINE typename Simd::Vec exp2_by_bits(typename Simd::Vec t) {
  using Vec = typename Simd::Vec;
  using Int = decltype(Vec{} < Vec{});
  constexpr float kLeast = -126.0f;
  const Vec clamped = t < kLeast ? Vec{} + kLeast : t;
  const Vec shifted = clamped + kRound;
  Vec p = exp2_polynomial<Simd>(clamped - (shifted - kRound));
  Int bits, n;
  __builtin_memcpy(&bits, &p, sizeof bits);
  __builtin_memcpy(&n, &shifted, sizeof n);
  bits += n << 23;
  __builtin_memcpy(&p, &bits, sizeof p);
  return t < kLeast ? Vec{} : p;
}

// The state of one row: what it has seen so far.
struct RowState {
  float max = kNothing;  // of the scores
  float sum = 0.0f;      // of exp(scale * (score - max))
};

// A row that sees no key so far, or whose scores are all NaN.
template <class Simd, class Packed>
SQ_ATTENTION_INLINE float hide_row(const float* s, int64_t padded, RowState* state, typename Packed::Operand* p) {
  for (int64_t j = 0; j < padded; j += Simd::kLanes) {
    typename Simd::Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    if (Simd::sum(value) != kNothing) state->max = state->sum = std::numeric_limits<float>::quiet_NaN();
    Packed::store(value == kNothing ? typename Simd::Vec{} : value, p + j);
  }
  return 1.0f;
}

// Keys whose scores are looked at together: `padded` is their number, up to a multiple of the lanes.
struct KeyBlock {
  int64_t first, count, padded;
};

// Multiplies scores s of these keys with the keys' scales, hides those that the row may not see and those up to
// `padded`, and returns the largest, if it is more than `most_before`.
template <class Simd>
SQ_ATTENTION_INLINE float largest_score(const AttentionArgs& args, const AttentionTask& task, int64_t row,
                                        const KeyBlock& keys, float most_before, float* s) {
  using Vec = typename Simd::Vec;
  const auto [first, count, padded] = keys;
  const int64_t visible = smaller(visible_keys(args, task, row) - first, count);
  if (args.k_scale != nullptr) {
    scale_scores<Simd>(row_address<float>(args.k_scale, args.k_scale_strides, task.batch, task.kv_head, first), count,
                       s);
  }
  if (args.mask != nullptr) {
    const uint8_t* mask =
        row_address<uint8_t>(args.mask, args.mask_strides, task.batch, task.kv_head * args.group + row % args.group,
                             task.queries.begin + row / args.group) +
        first;
    for (int64_t j = 0; j < visible; ++j) s[j] = mask[j] != 0 ? s[j] : kNothing;
  }
  for (int64_t j = visible < 0 ? 0 : visible; j < padded; ++j) s[j] = kNothing;
  Vec most = Vec{} + most_before;
  for (int64_t j = 0; j < padded; j += Simd::kLanes) {
    Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    most = most > value ? most : value;
  }
  return Simd::most(most);
}

// Scores to probabilities p = exp2(gain * (s - max)), times the scales of the values where these have some. Returns the sum
// before that.
template <class Simd, class Packed>
SQ_ATTENTION_INLINE float exponentiate_row(const float* v_scale, const KeyBlock& keys, float max, float gain,
                                           const float* s, typename Packed::Operand* p) {
  using Vec = typename Simd::Vec;
  Vec sum = {};
  for (int64_t j = 0; j < keys.padded; j += Simd::kLanes) {
    Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    value = Simd::exp2((value - max) * gain);
    sum += value;
    if (v_scale != nullptr) {
      const bool whole = j + Simd::kLanes <= keys.count;
      value *= whole ? Simd::widen(v_scale + j) : widen_some<Simd>(v_scale + j, keys.count - j);
    }
    Packed::store(value, p + j);
  }
  return Simd::sum(sum);
}

// What becomes of some rows: their states, and what the sums that came before must be multiplied with.
struct Softmax {
  RowState* states;
  float* factors;
};

// Scores s of these rows and keys to probabilities p, which lie as s does, perhaps in the same place.
template <class Simd, class Packed>
SQ_ATTENTION_INLINE void softmax_rows(const AttentionArgs& args, const AttentionTask& task, Range row_range,
                                      const KeyBlock& keys, const Softmax& softmax, Strided<float> s,
                                      typename Packed::Operand* p) {
  using Vec = typename Simd::Vec;
  static_assert(Packed::kStripe % Simd::kLanes == 0);
  constexpr float kLog2E = 1.44269504088896341f;
  const float gain = args.scale * kLog2E;
  const int64_t rows = row_range.end - row_range.begin;
  const auto [states, factors] = softmax;
  const float* v_scale = args.k_scale == nullptr ? nullptr
                                                 : row_address<float>(args.v_scale, args.v_scale_strides, task.batch,
                                                                      task.kv_head, keys.first);
  float max[Packed::kStripe] = {}, before[Packed::kStripe] = {};
  for (int64_t r = 0; r < rows; ++r) {
    before[r] = states[r].max;
    max[r] = largest_score<Simd>(args, task, row_range.begin + r, keys, before[r], s.data + r * s.stride);
  }
  // All rows together: one by one, each would wait for its own.
  for (int64_t r = 0; r < rows; r += Simd::kLanes) {
    Vec old, now;
    __builtin_memcpy(&old, before + r, sizeof old);
    __builtin_memcpy(&now, max + r, sizeof now);
    const Vec factor = old == kNothing ? Vec{} : Simd::exp2((old - now) * gain);
    __builtin_memcpy(factors + r, &factor, sizeof factor);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row_s = s.data + r * s.stride;
    if (max[r] == kNothing) {
      factors[r] = hide_row<Simd, Packed>(row_s, keys.padded, states + r, p + r * s.stride);
      continue;
    }
    const float sum = exponentiate_row<Simd, Packed>(v_scale, keys, max[r], gain, row_s, p + r * s.stride);
    states[r].max = max[r];
    states[r].sum = states[r].sum * factors[r] + sum;
  }
}

// --- results --------------------------------------------------------------------------------------------------------

template <class T>
SQ_ATTENTION_INLINE void store_row(const AttentionArgs& args, const AttentionTask& task, int64_t row,
                                   const RowState& state, const float* o) {
  if (task.partial != nullptr) {
    float* partial = task.partial + row * (args.v_d + 2);
    for (int64_t i = 0; i < args.v_d; ++i) partial[i] = o[i];
    partial[args.v_d] = state.max;
    partial[args.v_d + 1] = state.sum;
    return;
  }
  const int64_t query = task.queries.begin + row / args.group;
  const int64_t head = task.kv_head * args.group + row % args.group;
  T* y = static_cast<T*>(args.y) + ((task.batch * args.q_len + query) * args.heads + head) * args.v_d;
  const float gain = state.max == kNothing ? 0.0f : 1.0f / state.sum;
  for (int64_t i = 0; i < args.v_d; ++i) from_float(o[i] * gain, y + i);
}

}  // namespace
}  // namespace sq
