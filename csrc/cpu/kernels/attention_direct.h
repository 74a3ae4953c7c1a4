// Attention of few rows: keys and values as they lie. Part of attention_body.h.
#pragma once

#include "cpu/kernels/attention_softmax.h"

namespace sq {
namespace {

// Rows that are needed soon. A chunk of keys and one of values are too short for what the processor would fetch ahead by
// itself: asking for the values while the keys are read, and for the next keys meanwhile, takes a third off the time of
// 64 elements a head and half of that of 128, when neither is in cache (Zen 5, November 2026).
template <class E>
struct Prefetcher {
  const E* rows;
  int64_t stride, count, d;

  SQ_ATTENTION_INLINE void prefetch(int64_t row) const {
    if (row >= count) return;
    const auto* address = reinterpret_cast<const char*>(rows + row * stride);
    for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(E)); byte += 64) __builtin_prefetch(address + byte);
  }
};

// scores[r][j] = q[r] . k[j] of kCount rows and kSome keys.
template <class Simd, class E, int kCount, int kSome>
SQ_ATTENTION_INLINE void direct_scores_of(Strided<const float> q, Strided<const E> k, int64_t d, Strided<float> s) {
  using Vec = typename Simd::Vec;
  Vec acc[kCount][kSome] = {};
  const int64_t whole = d / Simd::kLanes * Simd::kLanes;
  for (int64_t i = 0; i < d; i += Simd::kLanes) {
    Vec keys[kSome];
#pragma GCC unroll 4
    for (int j = 0; j < kSome; ++j) {
      keys[j] = i < whole ? Simd::widen(k.data + j * k.stride + i) : widen_some<Simd>(k.data + j * k.stride + i, d - i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      Vec query;
      __builtin_memcpy(&query, q.data + r * q.stride + i, sizeof query);
#pragma GCC unroll 4
      for (int j = 0; j < kSome; ++j) acc[r][j] = Simd::multiply_add(query, keys[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    if constexpr (kSome == 4) {
      Simd::sums(acc[r], s.data + r * s.stride);
    } else {
      s.data[r * s.stride] = Simd::sum(acc[r][0]);
    }
  }
}

// Four keys at a time: adding up the lanes of their sums together takes a third of the steps. Every key gets the bits that
// it gets alone.
template <class Simd, class E, int kCount>
SQ_ATTENTION_TARGET void direct_scores(Strided<const float> q, Strided<const E> k, int64_t count, int64_t d,
                                       Strided<float> s, const Prefetcher<E>& prefetcher) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int64_t row = j; row < j + 4; ++row) prefetcher.prefetch(row);
    direct_scores_of<Simd, E, kCount, 4>(q, {k.data + j * k.stride, k.stride}, d, {s.data + j, s.stride});
  }
  for (; j < count; ++j) {
    direct_scores_of<Simd, E, kCount, 1>(q, {k.data + j * k.stride, k.stride}, d, {s.data + j, s.stride});
  }
}

// o[r] = sum over j of p[r][j] v[j], of kCount rows and kVecs vectors of columns, of which the last has `width` elements.
template <class Simd, class E, int kCount, int kVecs>
SQ_ATTENTION_INLINE void direct_values_of(Strided<const float> p, Strided<const E> v_rows, int64_t count, int64_t width,
                                          Strided<float> o, const Prefetcher<E>& prefetcher) {
  using Vec = typename Simd::Vec;
  Vec acc[kCount][kVecs] = {};
  const E* v = v_rows.data;
  for (int64_t j = 0; j < count; ++j, v += v_rows.stride) {
    prefetcher.prefetch(j);
    Vec values[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      values[i] = kVecs > 1 || width == Simd::kLanes ? Simd::widen(v + i * Simd::kLanes) : widen_some<Simd>(v, width);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const Vec weight = Simd::broadcast(p.data + r * p.stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) acc[r][i] = Simd::multiply_add(weight, values[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) __builtin_memcpy(o.data + r * o.stride, acc[r], sizeof acc[r]);
}

template <class Simd, class E, int kCount>
SQ_ATTENTION_TARGET void direct_values(Strided<const float> p, Strided<const E> v, int64_t count, int64_t d,
                                       Strided<float> o, const Prefetcher<E>& prefetcher) {
  const Prefetcher<E> nothing{};
  constexpr int kWide = Simd::kVecs;
  constexpr int64_t kStep = kWide * Simd::kLanes;
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    direct_values_of<Simd, E, kCount, kWide>(p, {v.data + i, v.stride}, count, Simd::kLanes, {o.data + i, o.stride},
                                             i == 0 ? prefetcher : nothing);
  }
  for (; i < d; i += Simd::kLanes) {
    direct_values_of<Simd, E, kCount, 1>(p, {v.data + i, v.stride}, count, smaller(Simd::kLanes, d - i),
                                         {o.data + i, o.stride}, i == 0 ? prefetcher : nothing);
  }
}

template <class Simd, class T, class E>
SQ_ATTENTION_TARGET void attend_direct(const AttentionArgs& args, const AttentionTask& task) {
  constexpr int64_t kRows = 4;
  const int64_t rows = (task.queries.end - task.queries.begin) * args.group;
  const int64_t count = task.keys.end - task.keys.begin;
  const int64_t padded = div_up(count, Simd::kLanes) * Simd::kLanes;
  const int64_t q_stride = div_up(args.d, Simd::kLanes) * Simd::kLanes;
  const int64_t o_stride = div_up(args.v_d, Simd::kLanes) * Simd::kLanes;
  Plan plan;
  const auto s_part = plan.add<float>(kRows * padded), q_part = plan.add<float>(kRows * q_stride);
  const auto o_part = plan.add<float>(kRows * o_stride);
  Scratch scratch(plan.bytes());
  float *s = s_part.in(scratch), *q = q_part.in(scratch), *o = o_part.in(scratch);
  const E* k = row_address<E>(args.k, args.k_strides, task.batch, task.kv_head, task.keys.begin);
  const E* v = row_address<E>(args.v, args.v_strides, task.batch, task.kv_head, task.keys.begin);

  constexpr decltype(&direct_scores<Simd, E, 1>) kScores[] = {direct_scores<Simd, E, 1>, direct_scores<Simd, E, 2>,
                                                              direct_scores<Simd, E, 3>, direct_scores<Simd, E, 4>};
  constexpr decltype(&direct_values<Simd, E, 1>) kValues[] = {direct_values<Simd, E, 1>, direct_values<Simd, E, 2>,
                                                              direct_values<Simd, E, 3>, direct_values<Simd, E, 4>};
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some = smaller(kRows, rows - row);
    RowState states[kRows];
    for (int64_t r = 0; r < some; ++r) {
      copy_row(query_address<T>(args, task, row + r), args.d, q_stride, q + r * q_stride);
    }
    const Prefetcher<E> next_values{v, args.v_strides.row, row == 0 ? count : 0, args.v_d};
    kScores[some - 1]({q, q_stride}, {k, args.k_strides.row}, count, args.d, {s, padded}, next_values);
    float factors[Simd::kStripe];
    softmax_rows<Simd, Simd>(args, task, {row, row + some}, {task.keys.begin, count, padded}, {states, factors},
                             {s, padded}, s);
    const Prefetcher<E> next_keys{k + count * args.k_strides.row, args.k_strides.row,
                                  row + some == rows ? args.kv_len - task.keys.end : 0, args.d};
    kValues[some - 1]({s, padded}, {v, args.v_strides.row}, count, args.v_d, {o, o_stride}, next_keys);
    for (int64_t r = 0; r < some; ++r) store_row<T>(args, task, row + r, states[r], o + r * o_stride);
  }
}

}  // namespace
}  // namespace sq
