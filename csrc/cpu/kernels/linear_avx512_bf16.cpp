// With vdpbf16ps: 4 columns of the weight times up to 4 rows of x are summed together, 32 k a step, so that a loaded vector
// of either is used several times and the sums are independent.
#include "avx512.h"
#include "linear.h"

#if SQ_X86

#define SQ_BF16_FEATURES SQ_AVX512_FEATURES ",avx512bf16"
#define SQ_BF16_INLINE inline __attribute__((always_inline, target(SQ_BF16_FEATURES)))

namespace sq {
namespace {

constexpr int64_t kColumns = 4;
constexpr int64_t kStep = 32;
constexpr int64_t kAhead = 4096;  // bytes between what is read and what is prefetched; Zen 5, November 2026

SQ_BF16_INLINE __m512i load(const BFloat16* source, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, source); }

SQ_BF16_INLINE void dot2(__m512& sum, __m512i a, __m512i b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

// y of kRows rows from `row` on and kCount columns from `column` on.
template <int kRows, int kCount>
__attribute__((target(SQ_BF16_FEATURES))) void tile(const LinearArgs& args, int64_t row, int64_t column) {
  const BFloat16 *x = args.x + row * args.k, *w = args.w + column * args.k;
  __m512 sums[kRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < args.k; k += kStep) {
    const auto mask = static_cast<__mmask32>(lane_mask(args.k - k, kStep));
    __m512i values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = load(x + r * args.k + k, mask);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const BFloat16* source = w + c * args.k + k;
      _mm_prefetch(reinterpret_cast<const char*>(source) + kAhead, _MM_HINT_T0);
      const __m512i weight = load(source, mask);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) dot2(sums[r][c], values[r], weight);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCount; ++c) {
      float sum = _mm512_reduce_add_ps(sums[r][c]);
      if (args.bias != nullptr) sum += to_float(args.bias[column + c]);
      from_float(sum, args.y + (row + r) * args.n + column + c);
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

}  // namespace

void linear_avx512_bf16(const LinearArgs& args, Range columns) {
  int64_t column = columns.begin;
  for (; column + kColumns <= columns.end; column += kColumns) columns_of_all_rows<kColumns>(args, column);
  for (; column < columns.end; ++column) columns_of_all_rows<1>(args, column);
}

}  // namespace sq

#endif
