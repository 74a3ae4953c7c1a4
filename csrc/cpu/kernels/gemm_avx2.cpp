// INT8 product with AVX2, which has no instruction for bytes that cannot overflow: both operands are widened to 16 bits and
// multiplied in pairs by vpmaddwd. The weight is widened 64 columns x 128 k at a time (16 KB, stays in L1), 4 rows of the
// activation likewise; a micro kernel holds 4 rows x 16 columns.
#include "epilogue.h"
#include "gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define SQ_AVX2 __attribute__((target("avx2")))
#define SQ_AVX2_INLINE inline __attribute__((always_inline, target("avx2")))

namespace sq {
namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kBlockRows = 128;  // rows whose sums wait for the next depth chunk: 32 KB
constexpr int64_t kDepth = 128;

// 4 * groups k of a panel to 16 bits: [k / 2][64 columns][2 k].
SQ_AVX2 void widen_panel(const uint8_t* b, int64_t groups, int16_t* wide) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t part = 0; part < 8; ++part) {  // 8 columns x 4 k
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + group * 256 + part * 32));
      const __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
      const __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1));
      // Pairs of k of one column are 32 bits; the even pairs of all 8 columns first, then the odd ones, columns in order.
      const __m256 a = _mm256_castsi256_ps(low), c = _mm256_castsi256_ps(high);
      const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, c, _MM_SHUFFLE(2, 0, 2, 0)));
      const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a, c, _MM_SHUFFLE(3, 1, 3, 1)));
      auto* target = reinterpret_cast<__m256i*>(wide + group * 256 + part * 16);
      _mm256_store_si256(target, _mm256_permute4x64_epi64(even, _MM_SHUFFLE(3, 1, 2, 0)));
      _mm256_store_si256(target + 8, _mm256_permute4x64_epi64(odd, _MM_SHUFFLE(3, 1, 2, 0)));
    }
  }
}

// Rows of a, stored 128 too large, to signed 16 bits; rows that do not exist become 0.
SQ_AVX2 void widen_rows(const uint8_t* a, int64_t a_stride, int64_t count, int64_t depth, int16_t* wide) {
  const __m128i offset = _mm_set1_epi8(static_cast<char>(kOffset));
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t k = 0; k < depth; k += 16) {
      __m256i values = _mm256_setzero_si256();
      if (row < count) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + row * a_stride + k));
        values = _mm256_cvtepi8_epi16(_mm_xor_si128(bytes, offset));
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(wide + row * kDepth + k), values);
    }
  }
}

SQ_AVX2_INLINE __m256i broadcast_pair(const int16_t* a) {
  int32_t pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return _mm256_set1_epi32(pair);
}

SQ_AVX2_INLINE void add_to(int32_t* sums, __m256i value) {
  auto* target = reinterpret_cast<__m256i*>(sums);
  _mm256_store_si256(target, _mm256_add_epi32(_mm256_load_si256(target), value));
}

// sums[4][64] += 4 widened rows times 16 columns of a widened panel, `pairs` pairs of k.
SQ_AVX2 void micro_kernel(const int16_t* a, const int16_t* b, int64_t pairs, int32_t* sums) {
  __m256i s00 = _mm256_setzero_si256(), s01 = s00, s10 = s00, s11 = s00, s20 = s00, s21 = s00, s30 = s00, s31 = s00;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const auto* source = reinterpret_cast<const __m256i*>(b + pair * 2 * kPanel);
    const __m256i b0 = _mm256_load_si256(source), b1 = _mm256_load_si256(source + 1);
    const int16_t* values = a + 2 * pair;
    const __m256i a0 = broadcast_pair(values), a1 = broadcast_pair(values + kDepth);
    s00 = _mm256_add_epi32(s00, _mm256_madd_epi16(a0, b0));
    s01 = _mm256_add_epi32(s01, _mm256_madd_epi16(a0, b1));
    s10 = _mm256_add_epi32(s10, _mm256_madd_epi16(a1, b0));
    s11 = _mm256_add_epi32(s11, _mm256_madd_epi16(a1, b1));
    const __m256i a2 = broadcast_pair(values + 2 * kDepth), a3 = broadcast_pair(values + 3 * kDepth);
    s20 = _mm256_add_epi32(s20, _mm256_madd_epi16(a2, b0));
    s21 = _mm256_add_epi32(s21, _mm256_madd_epi16(a2, b1));
    s30 = _mm256_add_epi32(s30, _mm256_madd_epi16(a3, b0));
    s31 = _mm256_add_epi32(s31, _mm256_madd_epi16(a3, b1));
  }
  add_to(sums, s00);
  add_to(sums + 8, s01);
  add_to(sums + kPanel, s10);
  add_to(sums + kPanel + 8, s11);
  add_to(sums + 2 * kPanel, s20);
  add_to(sums + 2 * kPanel + 8, s21);
  add_to(sums + 3 * kPanel, s30);
  add_to(sums + 3 * kPanel + 8, s31);
}

void gemm_panel(const GemmArgs& args, Range rows, int64_t panel) {
  alignas(32) int32_t sums[kBlockRows * kPanel] = {};
  alignas(32) int16_t b[kDepth * kPanel], a[kRows * kDepth];
  const uint8_t* packed = args.b + panel * panel_bytes(args.k);
  for (int64_t k = 0; k < args.k; k += kDepth) {
    const int64_t depth = padded_k(args.k) - k < kDepth ? padded_k(args.k) - k : kDepth;
    widen_panel(packed + k * kPanel, depth / 4, b);
    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
      const int64_t count = rows.end - row < kRows ? rows.end - row : kRows;
      widen_rows(args.a + row * args.a_stride + k, args.a_stride, count, depth, a);
      for (int64_t column = 0; column < kPanel; column += 16) {
        micro_kernel(a, b + 2 * column, depth / 2, sums + (row - rows.begin) * kPanel + column);
      }
    }
  }
  const ColumnScales columns(args, panel);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    store_row(args, columns, row, sums + (row - rows.begin) * kPanel);
  }
}

}  // namespace

void gemm_int8_avx2(const GemmArgs& args, Range rows, Range panels) {
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) gemm_panel(args, {row, end}, panel);
  }
}

}  // namespace sq

#endif
