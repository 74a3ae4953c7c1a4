// With vdpbf16ps: 4 columns of the weight times up to 4 rows of x are summed together, 32 k a step, so that a loaded vector
// of either is used several times and the sums are independent.
#include "cpu/kernels/avx512.h"
#include "cpu/kernels/linear.h"

#if SQ_X86

#define SQ_BF16_FEATURES SQ_AVX512_FEATURES ",avx512bf16"
#define SQ_BF16_INLINE inline __attribute__((always_inline, target(SQ_BF16_FEATURES)))

namespace sq {
namespace {

constexpr int64_t kColumns = 4;
constexpr int64_t kStep = 32;
constexpr int64_t kAhead = 8192;  // bytes between what is read and what is prefetched; Zen 5, November 2026

SQ_BF16_INLINE __m512i load(const BFloat16* source, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, source); }

SQ_BF16_INLINE void dot2(__m512& sum, __m512i a, __m512i b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// sums += kRows rows of x times kCount columns of w, 32 values of k.
template <int kRows, int kCount>
SQ_BF16_INLINE void step(const BFloat16* x, const BFloat16* w, int64_t stride, __mmask32 mask,
                         __m512 (&sums)[kRows][kCount]) {
  __m512i values[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) values[r] = load(x + r * stride, mask);
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) {
    const __m512i weight = load(w + c * stride, mask);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) dot2(sums[r][c], values[r], weight);
  }
}

SQ_BF16_INLINE __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

SQ_BF16_INLINE __m512 add_quads(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

// The sum of the lanes of sums[r][c] in lane 4 r + c. One by one, they would take longer than the products of a short row.
template <int kRows>
SQ_BF16_INLINE __m512 sum_lanes(const __m512 (&sums)[kRows][kColumns]) {
  __m512 rows[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    rows[r] = _mm512_setzero_ps();
    if (r < kRows) {
      const __m512 low = add_pairs(sums[r % kRows][0], sums[r % kRows][1]);
      const __m512 high = add_pairs(sums[r % kRows][2], sums[r % kRows][3]);
      const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
      rows[r] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
  }
  return add_quads(add_quads(rows[0], rows[1]), add_quads(rows[2], rows[3]));
}

template <int kRows>
SQ_BF16_INLINE void store(const LinearArgs& args, int64_t row, int64_t column, __m512 sums) {
  if (args.bias != nullptr) {
    const __m128i bias = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(args.bias + column));
    sums = _mm512_add_ps(sums, widen_bf16(_mm256_broadcastq_epi64(bias)));
  }
  alignas(32) BFloat16 values[4 * kColumns];
  _mm256_store_si256(reinterpret_cast<__m256i*>(values), _mm512_cvtepi32_epi16(round_bf16(sums)));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __builtin_memcpy(args.y + (row + r) * args.n + column, values + r * kColumns, sizeof(BFloat16) * kColumns);
  }
}

// y of kRows rows from `row` on and kCount columns from `column` on. The first rows to use these columns prefetch the
// memory kAhead further on.
template <int kRows, int kCount>
__attribute__((target(SQ_BF16_FEATURES))) void tile(const LinearArgs& args, int64_t row, int64_t column) {
  const int64_t k = args.k, whole = k / kStep * kStep;
  const BFloat16 *x = args.x + row * k, *w = args.w + column * k;
  const char* ahead = reinterpret_cast<const char*>(w) + kAhead;
  __m512 sums[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < whole; i += kStep) {
    if (row == 0) {
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) _mm_prefetch(ahead + 64 * c, _MM_HINT_T0);
      ahead += 64 * kCount;
    }
    step<kRows, kCount>(x + i, w + i, k, ~0u, sums);
  }
  if (whole < k) {
    step<kRows, kCount>(x + whole, w + whole, k, static_cast<__mmask32>(lane_mask(k - whole, kStep)), sums);
  }
  if constexpr (kCount == kColumns) {
    store<kRows>(args, row, column, sum_lanes<kRows>(sums));
  } else {
    for (int r = 0; r < kRows; ++r) {
      float sum = _mm512_reduce_add_ps(sums[r][0]);
      if (args.bias != nullptr) sum += to_float(args.bias[column]);
      from_float(sum, args.y + (row + r) * args.n + column);
    }
  }
}

template <int kCount>
void columns_of_all_rows(const LinearArgs& args, int64_t column) {
  int64_t row = 0;
  for (; row + 4 <= args.m; row += 4) tile<4, kCount>(args, row, column);
  switch (args.m - row) {
    case 3:
      return tile<3, kCount>(args, row, column);
    case 2:
      return tile<2, kCount>(args, row, column);
    case 1:
      return tile<1, kCount>(args, row, column);
    default:
      return;
  }
}

void linear_avx512_bf16(const LinearArgs& args, Range columns) {
  int64_t column = columns.begin;
  for (; column + kColumns <= columns.end; column += kColumns) columns_of_all_rows<kColumns>(args, column);
  for (; column < columns.end; ++column) columns_of_all_rows<1>(args, column);
}

}  // namespace

constexpr LinearKernels kLinearAvx512Bf16 = {"avx512bf16", linear_avx512_bf16};

}  // namespace sq

#endif
