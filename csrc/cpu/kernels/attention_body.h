// The body of attention.h for one instruction set. The file that includes it names the set in SQ_ATTENTION_TARGET (a
// function's attribute), and has a class W that calculates in fp32 and a class P, perhaps the same, for packed products:
//   Vec           kLanes floats: a GCC vector, with arithmetic operators
//   exp2(Vec)     of t <= 0, exp2_by_bits or better
//   widen(x)      Vec of fp32, bf16, fp16 or int8;  sum(Vec) and most(Vec), which may ignore NaN, of its lanes,
//                 sums(Vec[4], float*) of four;  transpose(words, stride, count, target, target_stride): kLanes x kLanes
//                 of 32 bits, the first `count` rows of the result, strides in bytes: W only
//   Operand       what products multiply: float, or the bits of a bf16. kPair of them along the depth make one Factor
//   kRows, kVecs  rows and vectors of the block of sums that stays in registers
//   kKeys, kStripe  keys that are packed at a time, and rows whose scores for them wait in L1
//   kDepth, kHeight  the multiples to which the depth of products is padded with 0, and their rows with anything
//   load(operands), broadcast(operands), multiply_add(Factor, Factor, Vec), store(Vec, operands) (W too)
//   interleave(even, odd, target)  32 operands of each, alternating: P with kPair of 2 only
#include "cpu/kernels/attention_softmax.h"

namespace sq {
namespace {

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

// --- many rows: packed blocks of keys ---------------------------------------------------------------------------------

// kCount rows of sums [64]: sums = sums * factor (or 0 without one) + a [kCount, depth] times a panel b [depth, columns].
template <class P, int kCount>
SQ_ATTENTION_INLINE void micro_kernel(const typename P::Operand* a, int64_t a_stride, const typename P::Operand* b,
                                      int64_t depth, const float* factor, float* sums, int64_t stride) {
  using Vec = typename P::Vec;
  Vec acc[kCount][P::kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < P::kVecs; ++v) {
      acc[r][v] = Vec{};
      if (factor != nullptr) {
        __builtin_memcpy(&acc[r][v], sums + r * stride + v * P::kLanes, sizeof(Vec));
        acc[r][v] *= factor[r];
      }
    }
  }
  for (int64_t k = 0; k < depth; k += P::kPair) {
    typename P::Factor column[P::kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < P::kVecs; ++v) column[v] = P::load(b + v * P::kLanes * P::kPair);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const typename P::Factor value = P::broadcast(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < P::kVecs; ++v) acc[r][v] = P::multiply_add(value, column[v], acc[r][v]);
    }
    b += P::kVecs * P::kLanes * P::kPair;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < P::kVecs; ++v) {
      __builtin_memcpy(sums + r * stride + v * P::kLanes, &acc[r][v], sizeof(Vec));
    }
  }
}

// sums [rows, panels * columns] = sums * factor + a [rows, depth] times b [panels][b_depth, columns], of which the first
// depth count.
template <class P>
struct Products {
  SQ_ATTENTION_TARGET __attribute__((noinline)) static void multiply(const typename P::Operand* a, int64_t a_stride,
                                                                     int64_t rows, const typename P::Operand* b,
                                                                     int64_t b_depth, int64_t depth, int64_t panels,
                                                                     const float* factor, float* sums, int64_t stride) {
    static_assert(P::kRows == 6, "the switch has a case for every number of rows");
    constexpr int64_t kColumns = P::kVecs * P::kLanes;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const typename P::Operand* b_panel = b + panel * b_depth * kColumns;
      for (int64_t row = 0; row < rows; row += P::kRows) {
        const typename P::Operand* a_row = a + row * a_stride;
        const float* row_factor = factor == nullptr ? nullptr : factor + row;
        float* target = sums + row * stride + panel * kColumns;
        switch (smaller(rows - row, P::kRows)) {
          case 6:
            micro_kernel<P, 6>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
            break;
          case 5:
            micro_kernel<P, 5>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
            break;
          case 4:
            micro_kernel<P, 4>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
            break;
          case 3:
            micro_kernel<P, 3>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
            break;
          case 2:
            micro_kernel<P, 2>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
            break;
          default:
            micro_kernel<P, 1>(a_row, a_stride, b_panel, depth, row_factor, target, stride);
        }
      }
    }
  }
};

// Keys [count, d] to [panels of columns][d / kPair][column][kPair]: columns are keys, those beyond `count` are 0.
template <class W, class P, class T>
SQ_ATTENTION_INLINE void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, int64_t padded_d,
                                   typename P::Operand* packed) {
  using Operand = typename P::Operand;
  static_assert(P::kPair * sizeof(Operand) == 4, "what is transposed are words of 32 bits");
  constexpr int64_t kColumns = P::kVecs * P::kLanes, kPart = 256, kBlock = W::kLanes * P::kPair;
  alignas(64) Operand rows[W::kLanes][kPart];
  for (int64_t key = 0; key < div_up(count, kColumns) * kColumns; key += W::kLanes) {
    Operand* column = packed + key / kColumns * padded_d * kColumns + key % kColumns * P::kPair;
    for (int64_t begin = 0; begin < padded_d; begin += kPart) {
      const int64_t part = smaller(kPart, padded_d - begin);
      for (int64_t row = 0; row < W::kLanes; ++row) {
        const int64_t there = key + row < count ? smaller(part, d - begin) : 0;
        copy_row(k + (key + row) * stride + begin, there, div_up(part, kBlock) * kBlock, rows[row]);
      }
      for (int64_t i = 0; i < part; i += kBlock) {
        W::transpose(rows[0] + i, kPart * sizeof(Operand), smaller(kBlock, part - i) / P::kPair,
                     column + (begin + i) * kColumns, kColumns * 4);
      }
    }
  }
}

// Values [count, d] to [panels of columns][P::kKeys / kPair][column][kPair]: columns are elements of v.
template <class P, class T>
SQ_ATTENTION_INLINE void pack_values(const T* v, int64_t stride, int64_t count, int64_t d, int64_t panels,
                                     typename P::Operand* packed) {
  constexpr int64_t kColumns = P::kVecs * P::kLanes;
  alignas(64) typename P::Operand rows[P::kPair][kColumns];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t width = smaller(kColumns, d - panel * kColumns);
    for (int64_t key = 0; key < div_up(count, P::kDepth) * P::kDepth; key += P::kPair) {
      for (int64_t pair = 0; pair < P::kPair; ++pair) {
        const int64_t there = key + pair < count ? width : 0;
        const T* source = v + (key + pair) * stride + panel * kColumns;
        // Of a known length it is a few instructions.
        there == kColumns ? copy_row(source, kColumns, kColumns, rows[pair])
                          : copy_row(source, there, kColumns, rows[pair]);
      }
      typename P::Operand* target = packed + (panel * P::kKeys + key) * kColumns;
      if constexpr (P::kPair == 2) {
        for (int64_t i = 0; i < kColumns; i += 32) P::interleave(rows[0] + i, rows[1] + i, target + 2 * i);
      } else {
        static_assert(P::kPair == 1);
        for (int64_t i = 0; i < kColumns; ++i) target[i] = rows[0][i];
      }
    }
  }
}

template <class W, class P, class T, class E>
SQ_ATTENTION_TARGET void attend_packed(const AttentionArgs& args, const AttentionTask& task) {
  using Operand = typename P::Operand;
  constexpr int64_t kColumns = P::kVecs * P::kLanes;
  static_assert(P::kKeys % kColumns == 0);
  const int64_t rows = (task.queries.end - task.queries.begin) * args.group;
  const int64_t padded_d = div_up(args.d, P::kDepth) * P::kDepth;
  const int64_t padded_rows = div_up(rows, P::kHeight) * P::kHeight;
  const int64_t panels = div_up(args.v_d, kColumns), width = panels * kColumns;
  const int64_t o_bytes = Scratch::align(padded_rows * width * 4);
  const int64_t q_bytes = Scratch::align(padded_rows * padded_d * static_cast<int64_t>(sizeof(Operand)));
  const int64_t k_bytes = Scratch::align(P::kKeys * padded_d * static_cast<int64_t>(sizeof(Operand)));
  const int64_t v_bytes = Scratch::align(P::kKeys * width * static_cast<int64_t>(sizeof(Operand)));
  constexpr int64_t kSBytes = P::kStripe * P::kKeys * 4, kPBytes = P::kStripe * P::kKeys * sizeof(Operand);
  Scratch scratch(o_bytes + q_bytes + k_bytes + v_bytes + kSBytes + kPBytes +
                  rows * static_cast<int64_t>(sizeof(RowState)));
  uint8_t* memory = scratch.data();
  auto* o = reinterpret_cast<float*>(memory);
  auto* q = reinterpret_cast<Operand*>(memory += o_bytes);
  auto* k = reinterpret_cast<Operand*>(memory += q_bytes);
  auto* v = reinterpret_cast<Operand*>(memory += k_bytes);
  auto* s = reinterpret_cast<float*>(memory += v_bytes);
  auto* p = reinterpret_cast<Operand*>(memory += kSBytes);
  auto* states = reinterpret_cast<RowState*>(memory += kPBytes);

  for (int64_t row = 0; row < rows; ++row) {
    copy_row(query_address<T>(args, task, row), args.d, padded_d, q + row * padded_d);
    states[row] = RowState();
  }
  for (int64_t i = 0; i < rows * width; ++i) o[i] = 0.0f;

  const int64_t end = smaller(task.keys.end, visible_keys(args, task, rows - 1));
  for (int64_t first = task.keys.begin; first < end; first += P::kKeys) {
    const int64_t count = smaller(P::kKeys, end - first);
    pack_keys<W, P>(row_address<E>(args.k, args.k_strides, task.batch, task.kv_head, first), args.k_strides.row, count,
                    args.d, padded_d, k);
    pack_values<P>(row_address<E>(args.v, args.v_strides, task.batch, task.kv_head, first), args.v_strides.row, count,
                   args.v_d, panels, v);
    for (int64_t row = 0; row < rows; row += P::kStripe) {
      const int64_t stripe = smaller(P::kStripe, rows - row);
      const int64_t seen = smaller(count, visible_keys(args, task, row + stripe - 1) - first);
      if (seen <= 0) continue;
      const int64_t padded = div_up(seen, P::kDepth) * P::kDepth;
      Products<P>::multiply(q + row * padded_d, padded_d, stripe, k, padded_d, padded_d, div_up(seen, kColumns),
                            nullptr, s, P::kKeys);
      float factors[P::kStripe];
      softmax_rows<W, P>(args, task, row, stripe, first, seen, padded, states + row, s, P::kKeys, p, factors);
      Products<P>::multiply(p, P::kKeys, stripe, v, P::kKeys, padded, panels, factors, o + row * width, width);
    }
  }
  for (int64_t row = 0; row < rows; ++row) store_row<T>(args, task, row, states[row], o + row * width);
}

// --- few rows: keys and values as they lie ----------------------------------------------------------------------------

// Rows that are needed soon. A chunk of keys and one of values are too short for what the processor would fetch ahead by
// itself: asking for the values while the keys are read, and for the next keys meanwhile, takes a third off the time of
// 64 elements a head and half of that of 128, when neither is in cache (Zen 5, November 2026).
template <class E>
struct Ahead {
  const E* rows;
  int64_t stride, count, d;

  SQ_ATTENTION_INLINE void prefetch(int64_t row) const {
    if (row >= count) return;
    const auto* address = reinterpret_cast<const char*>(rows + row * stride);
    for (int64_t byte = 0; byte < d * static_cast<int64_t>(sizeof(E)); byte += 64) __builtin_prefetch(address + byte);
  }
};

// scores[r][j] = q[r] . k[j] of kCount rows and kSome keys.
template <class W, class E, int kCount, int kSome>
SQ_ATTENTION_INLINE void direct_scores_of(const float* q, int64_t q_stride, const E* k, int64_t stride, int64_t d,
                                          float* s, int64_t s_stride) {
  using Vec = typename W::Vec;
  Vec acc[kCount][kSome] = {};
  const int64_t whole = d / W::kLanes * W::kLanes;
  for (int64_t i = 0; i < d; i += W::kLanes) {
    Vec keys[kSome];
#pragma GCC unroll 4
    for (int j = 0; j < kSome; ++j) {
      keys[j] = i < whole ? W::widen(k + j * stride + i) : widen_some<W>(k + j * stride + i, d - i);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      Vec query;
      __builtin_memcpy(&query, q + r * q_stride + i, sizeof query);
#pragma GCC unroll 4
      for (int j = 0; j < kSome; ++j) acc[r][j] = W::multiply_add(query, keys[j], acc[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) {
    if constexpr (kSome == 4) {
      W::sums(acc[r], s + r * s_stride);
    } else {
      s[r * s_stride] = W::sum(acc[r][0]);
    }
  }
}

// Four keys at a time: adding up the lanes of their sums together takes a third of the steps. Every key gets the bits that
// it gets alone.
template <class W, class E, int kCount>
SQ_ATTENTION_TARGET void direct_scores(const float* q, int64_t q_stride, const E* k, int64_t stride, int64_t count,
                                       int64_t d, float* s, int64_t s_stride, const Ahead<E>& ahead) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    for (int64_t row = j; row < j + 4; ++row) ahead.prefetch(row);
    direct_scores_of<W, E, kCount, 4>(q, q_stride, k + j * stride, stride, d, s + j, s_stride);
  }
  for (; j < count; ++j) {
    direct_scores_of<W, E, kCount, 1>(q, q_stride, k + j * stride, stride, d, s + j, s_stride);
  }
}

// o[r] = sum over j of p[r][j] v[j], of kCount rows and kVecs vectors of columns, of which the last has `width` elements.
template <class W, class E, int kCount, int kVecs>
SQ_ATTENTION_INLINE void direct_values_of(const float* p, int64_t p_stride, const E* v, int64_t stride, int64_t count,
                                          int64_t width, float* o, int64_t o_stride, const Ahead<E>& ahead) {
  using Vec = typename W::Vec;
  Vec acc[kCount][kVecs] = {};
  for (int64_t j = 0; j < count; ++j, v += stride) {
    ahead.prefetch(j);
    Vec values[kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) {
      values[i] = kVecs > 1 || width == W::kLanes ? W::widen(v + i * W::kLanes) : widen_some<W>(v, width);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const Vec weight = W::broadcast(p + r * p_stride + j);
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) acc[r][i] = W::multiply_add(weight, values[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kCount; ++r) __builtin_memcpy(o + r * o_stride, acc[r], sizeof acc[r]);
}

template <class W, class E, int kCount>
SQ_ATTENTION_TARGET void direct_values(const float* p, int64_t p_stride, const E* v, int64_t stride, int64_t count,
                                       int64_t d, float* o, int64_t o_stride, const Ahead<E>& ahead) {
  const Ahead<E> nothing{};
  constexpr int kWide = W::kVecs;
  constexpr int64_t kStep = kWide * W::kLanes;
  int64_t i = 0;
  for (; i + kStep <= d; i += kStep) {
    direct_values_of<W, E, kCount, kWide>(p, p_stride, v + i, stride, count, W::kLanes, o + i, o_stride,
                                          i == 0 ? ahead : nothing);
  }
  for (; i < d; i += W::kLanes) {
    direct_values_of<W, E, kCount, 1>(p, p_stride, v + i, stride, count, smaller(W::kLanes, d - i), o + i, o_stride,
                                      i == 0 ? ahead : nothing);
  }
}

template <class W, class T, class E>
SQ_ATTENTION_TARGET void attend_direct(const AttentionArgs& args, const AttentionTask& task) {
  constexpr int64_t kRows = 4;
  const int64_t rows = (task.queries.end - task.queries.begin) * args.group;
  const int64_t count = task.keys.end - task.keys.begin;
  const int64_t padded = div_up(count, W::kLanes) * W::kLanes;
  const int64_t q_stride = div_up(args.d, W::kLanes) * W::kLanes;
  const int64_t o_stride = div_up(args.v_d, W::kLanes) * W::kLanes;
  Scratch scratch(kRows * (padded + q_stride + o_stride) * 4);
  auto* s = reinterpret_cast<float*>(scratch.data());
  float* q = s + kRows * padded;
  float* o = q + kRows * q_stride;
  const E* k = row_address<E>(args.k, args.k_strides, task.batch, task.kv_head, task.keys.begin);
  const E* v = row_address<E>(args.v, args.v_strides, task.batch, task.kv_head, task.keys.begin);

  constexpr decltype(&direct_scores<W, E, 1>) kScores[] = {direct_scores<W, E, 1>, direct_scores<W, E, 2>,
                                                           direct_scores<W, E, 3>, direct_scores<W, E, 4>};
  constexpr decltype(&direct_values<W, E, 1>) kValues[] = {direct_values<W, E, 1>, direct_values<W, E, 2>,
                                                           direct_values<W, E, 3>, direct_values<W, E, 4>};
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t some = smaller(kRows, rows - row);
    RowState states[kRows];
    for (int64_t r = 0; r < some; ++r) {
      copy_row(query_address<T>(args, task, row + r), args.d, q_stride, q + r * q_stride);
    }
    const Ahead<E> values{v, args.v_strides.row, row == 0 ? count : 0, args.v_d};
    kScores[some - 1](q, q_stride, k, args.k_strides.row, count, args.d, s, padded, values);
    float factors[W::kStripe];
    softmax_rows<W, W>(args, task, row, some, task.keys.begin, count, padded, states, s, padded, s, factors);
    const Ahead<E> next{k + count * args.k_strides.row, args.k_strides.row,
                        row + some == rows ? args.kv_len - task.keys.end : 0, args.d};
    kValues[some - 1](s, padded, v, args.v_strides.row, count, args.v_d, o, o_stride, next);
    for (int64_t r = 0; r < some; ++r) store_row<T>(args, task, row + r, states[r], o + r * o_stride);
  }
}

// E: the elements of k and v.
template <class W, class P, class T, class E>
SQ_ATTENTION_TARGET void attend_elements(const AttentionArgs& args, const AttentionTask& task) {
  if ((task.queries.end - task.queries.begin) * args.group <= kAttentionDirectRows) {
    attend_direct<W, T, E>(args, task);
  } else {
    attend_packed<W, P, T, E>(args, task);
  }
}

template <class W, class P, class T>
SQ_ATTENTION_TARGET void attend(const AttentionArgs& args, const AttentionTask& task) {
  if (args.k_scale == nullptr) {
    attend_elements<W, P, T, T>(args, task);
  } else {
    attend_elements<W, P, T, int8_t>(args, task);
  }
}

// Of q, and of k and v unless they have scales, in the dtype that the arguments name.
template <class W, class P>
SQ_ATTENTION_TARGET void attend_in_dtype(const AttentionArgs& args, const AttentionTask& task) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return attend<W, P, BFloat16>(args, task);
    case DType::kFloat16:
      return attend<W, P, Float16>(args, task);
    default:
      return attend<W, P, float>(args, task);
  }
}

}  // namespace
}  // namespace sq
