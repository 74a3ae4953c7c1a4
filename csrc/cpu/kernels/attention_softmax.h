// What a row of scores goes through: where its operands lie, which keys it may see, and the online softmax. Part of
// attention_body.h, which names the classes W and P.
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

// The transpose of a class W, word by word.
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
template <class W, class T>
SQ_ATTENTION_INLINE typename W::Vec widen_some(const T* source, int64_t count) {
  T padded[W::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = source[i];
  return W::widen(padded);
}

// s *= scale, element by element.
template <class W>
SQ_ATTENTION_INLINE void scale_scores(const float* scale, int64_t count, float* s) {
  int64_t j = 0;
  for (; j + W::kLanes <= count; j += W::kLanes) {
    const typename W::Vec product = W::widen(s + j) * W::widen(scale + j);
    __builtin_memcpy(s + j, &product, sizeof product);
  }
  for (; j < count; ++j) s[j] *= scale[j];
}

// --- softmax --------------------------------------------------------------------------------------------------------

// Cephes' polynomial for 2^r, |r| <= 1/2 (exp2f).
template <class W>
SQ_ATTENTION_INLINE typename W::Vec exp2_polynomial(typename W::Vec r) {
  using Vec = typename W::Vec;
  Vec p = W::multiply_add(Vec{} + 1.535336188319500e-4f, r, Vec{} + 1.339887440266574e-3f);
  p = W::multiply_add(p, r, Vec{} + 9.618437357674640e-3f);
  p = W::multiply_add(p, r, Vec{} + 5.550332471162809e-2f);
  p = W::multiply_add(p, r, Vec{} + 2.402264791363012e-1f);
  p = W::multiply_add(p, r, Vec{} + 6.931472028550421e-1f);
  return W::multiply_add(p, r, Vec{} + 1.0f);
}

constexpr float kRound =
    12582912.0f;  // 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits

// The exp2 of a class W, 2^n 2^r with n the nearest integer: of t <= 0; 0 below 2^-126. A NaN stays.
template <class W>
SQ_ATTENTION_INLINE typename W::Vec exp2_by_bits(typename W::Vec t) {
  using Vec = typename W::Vec;
  using Int = decltype(Vec{} < Vec{});
  constexpr float kLeast = -126.0f;
  const Vec clamped = t < kLeast ? Vec{} + kLeast : t;
  const Vec shifted = clamped + kRound;
  Vec p = exp2_polynomial<W>(clamped - (shifted - kRound));
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
template <class W, class P>
SQ_ATTENTION_INLINE float hide_row(const float* s, int64_t padded, RowState* state, typename P::Operand* p) {
  for (int64_t j = 0; j < padded; j += W::kLanes) {
    typename W::Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    if (W::sum(value) != kNothing) state->max = state->sum = std::numeric_limits<float>::quiet_NaN();
    P::store(value == kNothing ? typename W::Vec{} : value, p + j);
  }
  return 1.0f;
}

// Multiplies scores s of keys [first, first + count) with the keys' scales, hides those that the row may not see and those up
// to `padded`, and returns the largest, if it is more than `most`.
template <class W>
SQ_ATTENTION_INLINE float largest_score(const AttentionArgs& args, const AttentionTask& task, int64_t row,
                                        int64_t first, int64_t count, int64_t padded, float most_before, float* s) {
  using Vec = typename W::Vec;
  const int64_t visible = smaller(visible_keys(args, task, row) - first, count);
  if (args.k_scale != nullptr) {
    scale_scores<W>(row_address<float>(args.k_scale, args.k_scale_strides, task.batch, task.kv_head, first), count, s);
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
  for (int64_t j = 0; j < padded; j += W::kLanes) {
    Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    most = most > value ? most : value;
  }
  return W::most(most);
}

// Scores to probabilities p = exp2(gain * (s - max)), times the scales of the values where these have some. Returns the sum
// before that.
template <class W, class P>
SQ_ATTENTION_INLINE float exponentiate_row(const float* v_scale, int64_t count, int64_t padded, float max, float gain,
                                           const float* s, typename P::Operand* p) {
  using Vec = typename W::Vec;
  Vec sum = {};
  for (int64_t j = 0; j < padded; j += W::kLanes) {
    Vec value;
    __builtin_memcpy(&value, s + j, sizeof value);
    value = W::exp2((value - max) * gain);
    sum += value;
    if (v_scale != nullptr) {
      const bool whole = j + W::kLanes <= count;
      value *= whole ? W::widen(v_scale + j) : widen_some<W>(v_scale + j, count - j);
    }
    P::store(value, p + j);
  }
  return W::sum(sum);
}

// Scores s [rows, s_stride] of keys [first, first + count) to probabilities p [rows, s_stride], which may lie in the same
// place; `padded` is a multiple of the lanes. factors: what the sums that came before must be multiplied with.
template <class W, class P>
SQ_ATTENTION_INLINE void softmax_rows(const AttentionArgs& args, const AttentionTask& task, int64_t row, int64_t rows,
                                      int64_t first, int64_t count, int64_t padded, RowState* states, float* s,
                                      int64_t s_stride, typename P::Operand* p, float* factors) {
  using Vec = typename W::Vec;
  static_assert(P::kStripe % W::kLanes == 0);
  constexpr float kLog2E = 1.44269504088896341f;
  const float gain = args.scale * kLog2E;
  const float* v_scale = args.k_scale == nullptr
                             ? nullptr
                             : row_address<float>(args.v_scale, args.v_scale_strides, task.batch, task.kv_head, first);
  float max[P::kStripe] = {}, before[P::kStripe] = {};
  for (int64_t r = 0; r < rows; ++r) {
    before[r] = states[r].max;
    max[r] = largest_score<W>(args, task, row + r, first, count, padded, before[r], s + r * s_stride);
  }
  // All rows together: one by one, each would wait for its own.
  for (int64_t r = 0; r < rows; r += W::kLanes) {
    Vec old, now;
    __builtin_memcpy(&old, before + r, sizeof old);
    __builtin_memcpy(&now, max + r, sizeof now);
    const Vec factor = old == kNothing ? Vec{} : W::exp2((old - now) * gain);
    __builtin_memcpy(factors + r, &factor, sizeof factor);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* row_s = s + r * s_stride;
    if (max[r] == kNothing) {
      factors[r] = hide_row<W, P>(row_s, padded, states + r, p + r * s_stride);
      continue;
    }
    const float sum = exponentiate_row<W, P>(v_scale, count, padded, max[r], gain, row_s, p + r * s_stride);
    states[r].max = max[r];
    states[r].sum = states[r].sum * factors[r] + sum;
  }
}

}  // namespace
}  // namespace sq
