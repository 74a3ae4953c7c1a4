// Attention of many rows: products with packed blocks of keys. Part of attention_body.h.
#pragma once

#include "cpu/kernels/attention_softmax.h"

namespace sq {
namespace {

// kCount rows of sums [64]: sums = sums * factor (or 0 without one) + a [kCount, depth] times a panel b [depth, columns].
template <class Packed, int kCount>
SQ_ATTENTION_INLINE void micro_kernel(Strided<const typename Packed::Operand> a, const typename Packed::Operand* b,
                                      int64_t depth, const float* factor, Strided<float> sums) {
  using Vec = typename Packed::Vec;
  Vec acc[kCount][Packed::kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Packed::kVecs; ++v) {
      acc[r][v] = Vec{};
      if (factor != nullptr) {
        __builtin_memcpy(&acc[r][v], sums.data + r * sums.stride + v * Packed::kLanes, sizeof(Vec));
        acc[r][v] *= factor[r];
      }
    }
  }
  for (int64_t k = 0; k < depth; k += Packed::kPair) {
    typename Packed::Factor column[Packed::kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < Packed::kVecs; ++v) column[v] = Packed::load(b + v * Packed::kLanes * Packed::kPair);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const typename Packed::Factor value = Packed::broadcast(a.data + r * a.stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < Packed::kVecs; ++v) acc[r][v] = Packed::multiply_add(value, column[v], acc[r][v]);
    }
    b += Packed::kVecs * Packed::kLanes * Packed::kPair;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Packed::kVecs; ++v) {
      __builtin_memcpy(sums.data + r * sums.stride + v * Packed::kLanes, &acc[r][v], sizeof(Vec));
    }
  }
}

// Panels of columns, each [depth, columns].
template <class Operand>
struct Panels {
  const Operand* data;
  int64_t depth, count;
};

// sums [rows, panels * columns] = sums * factor + a [rows, depth] times b, of whose depth this much counts.
template <class Packed>
struct Products {
  SQ_ATTENTION_TARGET __attribute__((noinline)) static void multiply(Strided<const typename Packed::Operand> a,
                                                                     int64_t rows,
                                                                     const Panels<typename Packed::Operand>& b,
                                                                     int64_t depth, const float* factor,
                                                                     Strided<float> sums) {
    static_assert(Packed::kRows == 6, "the switch has a case for every number of rows");
    constexpr int64_t kColumns = Packed::kVecs * Packed::kLanes;
    for (int64_t panel = 0; panel < b.count; ++panel) {
      const typename Packed::Operand* b_panel = b.data + panel * b.depth * kColumns;
      for (int64_t row = 0; row < rows; row += Packed::kRows) {
        const Strided<const typename Packed::Operand> a_row = {a.data + row * a.stride, a.stride};
        const float* row_factor = factor == nullptr ? nullptr : factor + row;
        const Strided<float> target = {sums.data + row * sums.stride + panel * kColumns, sums.stride};
        switch (smaller(rows - row, Packed::kRows)) {
          case 6:
            micro_kernel<Packed, 6>(a_row, b_panel, depth, row_factor, target);
            break;
          case 5:
            micro_kernel<Packed, 5>(a_row, b_panel, depth, row_factor, target);
            break;
          case 4:
            micro_kernel<Packed, 4>(a_row, b_panel, depth, row_factor, target);
            break;
          case 3:
            micro_kernel<Packed, 3>(a_row, b_panel, depth, row_factor, target);
            break;
          case 2:
            micro_kernel<Packed, 2>(a_row, b_panel, depth, row_factor, target);
            break;
          default:
            micro_kernel<Packed, 1>(a_row, b_panel, depth, row_factor, target);
        }
      }
    }
  }
};

// Keys [count, d] to [panels of columns][d / kPair][column][kPair]: columns are keys, those beyond `count` are 0.
template <class Simd, class Packed, class T>
SQ_ATTENTION_INLINE void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, int64_t padded_d,
                                   typename Packed::Operand* packed) {
  using Operand = typename Packed::Operand;
  static_assert(Packed::kPair * sizeof(Operand) == 4, "what is transposed are words of 32 bits");
  constexpr int64_t kColumns = Packed::kVecs * Packed::kLanes, kPart = 256, kBlock = Simd::kLanes * Packed::kPair;
  alignas(64) Operand rows[Simd::kLanes][kPart];
  for (int64_t key = 0; key < div_up(count, kColumns) * kColumns; key += Simd::kLanes) {
    Operand* column = packed + key / kColumns * padded_d * kColumns + key % kColumns * Packed::kPair;
    for (int64_t begin = 0; begin < padded_d; begin += kPart) {
      const int64_t part = smaller(kPart, padded_d - begin);
      for (int64_t row = 0; row < Simd::kLanes; ++row) {
        const int64_t there = key + row < count ? smaller(part, d - begin) : 0;
        copy_row(k + (key + row) * stride + begin, there, div_up(part, kBlock) * kBlock, rows[row]);
      }
      for (int64_t i = 0; i < part; i += kBlock) {
        Simd::transpose(rows[0] + i, kPart * sizeof(Operand), smaller(kBlock, part - i) / Packed::kPair,
                        column + (begin + i) * kColumns, kColumns * 4);
      }
    }
  }
}

// Values [count, d] to [panels of columns][Packed::kKeys / kPair][column][kPair]: columns are elements of v.
template <class Packed, class T>
SQ_ATTENTION_INLINE void pack_values(const T* v, int64_t stride, int64_t count, int64_t d, int64_t panels,
                                     typename Packed::Operand* packed) {
  constexpr int64_t kColumns = Packed::kVecs * Packed::kLanes;
  alignas(64) typename Packed::Operand rows[Packed::kPair][kColumns];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t width = smaller(kColumns, d - panel * kColumns);
    for (int64_t key = 0; key < div_up(count, Packed::kDepth) * Packed::kDepth; key += Packed::kPair) {
      for (int64_t pair = 0; pair < Packed::kPair; ++pair) {
        const int64_t there = key + pair < count ? width : 0;
        const T* source = v + (key + pair) * stride + panel * kColumns;
        // Of a known length it is a few instructions.
        there == kColumns ? copy_row(source, kColumns, kColumns, rows[pair])
                          : copy_row(source, there, kColumns, rows[pair]);
      }
      typename Packed::Operand* target = packed + (panel * Packed::kKeys + key) * kColumns;
      if constexpr (Packed::kPair == 2) {
        for (int64_t i = 0; i < kColumns; i += 32) Packed::interleave(rows[0] + i, rows[1] + i, target + 2 * i);
      } else {
        static_assert(Packed::kPair == 1);
        for (int64_t i = 0; i < kColumns; ++i) target[i] = rows[0][i];
      }
    }
  }
}

template <class Simd, class Packed, class T, class E>
SQ_ATTENTION_TARGET void attend_packed(const AttentionArgs& args, const AttentionTask& task) {
  using Operand = typename Packed::Operand;
  constexpr int64_t kColumns = Packed::kVecs * Packed::kLanes;
  static_assert(Packed::kKeys % kColumns == 0);
  const int64_t rows = (task.queries.end - task.queries.begin) * args.group;
  const int64_t padded_d = div_up(args.d, Packed::kDepth) * Packed::kDepth;
  const int64_t padded_rows = div_up(rows, Packed::kHeight) * Packed::kHeight;
  const int64_t panels = div_up(args.v_d, kColumns), width = panels * kColumns;
  Plan plan;
  const auto o_part = plan.add<float>(padded_rows * width), s_part = plan.add<float>(Packed::kStripe * Packed::kKeys);
  const auto q_part = plan.add<Operand>(padded_rows * padded_d), k_part = plan.add<Operand>(Packed::kKeys * padded_d);
  const auto v_part = plan.add<Operand>(Packed::kKeys * width),
             p_part = plan.add<Operand>(Packed::kStripe * Packed::kKeys);
  const auto states_part = plan.add<RowState>(rows);
  Scratch scratch(plan.bytes());
  float *o = o_part.in(scratch), *s = s_part.in(scratch);
  Operand *q = q_part.in(scratch), *k = k_part.in(scratch), *v = v_part.in(scratch), *p = p_part.in(scratch);
  RowState* states = states_part.in(scratch);

  for (int64_t row = 0; row < rows; ++row) {
    copy_row(query_address<T>(args, task, row), args.d, padded_d, q + row * padded_d);
    states[row] = RowState();
  }
  for (int64_t i = 0; i < rows * width; ++i) o[i] = 0.0f;

  const int64_t end = smaller(task.keys.end, visible_keys(args, task, rows - 1));
  for (int64_t first = task.keys.begin; first < end; first += Packed::kKeys) {
    const int64_t count = smaller(Packed::kKeys, end - first);
    pack_keys<Simd, Packed>(row_address<E>(args.k, args.k_strides, task.batch, task.kv_head, first), args.k_strides.row,
                            count, args.d, padded_d, k);
    pack_values<Packed>(row_address<E>(args.v, args.v_strides, task.batch, task.kv_head, first), args.v_strides.row,
                        count, args.v_d, panels, v);
    for (int64_t row = 0; row < rows; row += Packed::kStripe) {
      const int64_t stripe = smaller(Packed::kStripe, rows - row);
      const int64_t seen = smaller(count, visible_keys(args, task, row + stripe - 1) - first);
      if (seen <= 0) continue;
      const int64_t padded = div_up(seen, Packed::kDepth) * Packed::kDepth;
      Products<Packed>::multiply({q + row * padded_d, padded_d}, stripe, {k, padded_d, div_up(seen, kColumns)},
                                 padded_d, nullptr, {s, Packed::kKeys});
      float factors[Packed::kStripe];
      softmax_rows<Simd, Packed>(args, task, {row, row + stripe}, {first, seen, padded}, {states + row, factors},
                                 {s, Packed::kKeys}, p);
      Products<Packed>::multiply({p, Packed::kKeys}, stripe, {v, Packed::kKeys, panels}, padded, factors,
                                 {o + row * width, width});
    }
  }
  for (int64_t row = 0; row < rows; ++row) store_row<T>(args, task, row, states[row], o + row * width);
}

}  // namespace
}  // namespace sq
