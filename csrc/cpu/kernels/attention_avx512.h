// What multiplies in fp32 for attention_avx512.cpp and, of few rows, for attention_avx512_bf16.cpp; each names its
// instruction set in SQ_ATTENTION_TARGET.
#pragma once

#include "cpu/kernels/attention_body.h"
#include "cpu/kernels/avx512.h"

namespace sq {
namespace {

struct Avx512 {
  using Vec = float __attribute__((vector_size(64)));
  using Operand = float;
  using Factor = Vec;
  static constexpr int kLanes = 16, kPair = 1, kRows = 6, kVecs = 4, kDepth = 16, kHeight = 1, kKeys = 128,
                       kStripe = 48;

  SQ_ATTENTION_INLINE static Vec load(const float* operands) { return _mm512_loadu_ps(operands); }
  SQ_ATTENTION_INLINE static Vec broadcast(const float* operand) { return _mm512_set1_ps(*operand); }
  SQ_ATTENTION_INLINE static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
  SQ_ATTENTION_INLINE static Vec exp2(Vec t) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(t, Vec{} - 126.0f, _CMP_NLT_UQ);  // or NaN; others would be slow
    const Vec n = (t + kRound) - kRound;
    return _mm512_maskz_scalef_ps(is_normal, exp2_polynomial<Avx512>(t - n), n);
  }
  SQ_ATTENTION_INLINE static void store(Vec value, float* target) { _mm512_storeu_ps(target, value); }
  // Lane k of a quarter with lane k + 2, then with lane k + 1; then quarters with those 8 and 4 lanes on.
  SQ_ATTENTION_INLINE static __m128 add_quarters(Vec value) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  SQ_ATTENTION_INLINE static float sum(Vec value) {
    const Vec two = value + Vec(_mm512_permute_ps(value, 0x4E));
    return _mm_cvtss_f32(add_quarters(two + Vec(_mm512_permute_ps(two, 0xB1))));
  }
  SQ_ATTENTION_INLINE static float most(Vec value) {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_max_ps(four, _mm_permute_ps(four, 0x4E));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_permute_ps(two, 0xB1)));
  }
  SQ_ATTENTION_INLINE static void sums(const Vec* four, float* target) {
    const Vec low = Vec(_mm512_unpacklo_ps(four[0], four[1])) + Vec(_mm512_unpackhi_ps(four[0], four[1]));
    const Vec high = Vec(_mm512_unpacklo_ps(four[2], four[3])) + Vec(_mm512_unpackhi_ps(four[2], four[3]));
    const Vec all = Vec(_mm512_shuffle_ps(low, high, 0x44)) + Vec(_mm512_shuffle_ps(low, high, 0xEE));
    _mm_storeu_ps(target, add_quarters(all));
  }
  SQ_ATTENTION_INLINE static void transpose(const void* words, int64_t stride, int64_t count, void* target,
                                            int64_t target_stride) {
    __m512i rows[16], pairs[16], fours[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(static_cast<const uint8_t*>(words) + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Then quarter q of fours[4 i + c] is column 4 q + c of rows 4 i to 4 i + 3.
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4) {
      fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
      fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
      fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even_0 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
      const __m512i even_1 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
      const __m512i odd_0 = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xDD);
      const __m512i odd_1 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xDD);
      rows[c] = _mm512_shuffle_i32x4(even_0, even_1, 0x88);
      rows[4 + c] = _mm512_shuffle_i32x4(odd_0, odd_1, 0x88);
      rows[8 + c] = _mm512_shuffle_i32x4(even_0, even_1, 0xDD);
      rows[12 + c] = _mm512_shuffle_i32x4(odd_0, odd_1, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i < count) _mm512_storeu_si512(static_cast<uint8_t*>(target) + i * target_stride, rows[i]);
    }
  }
  SQ_ATTENTION_INLINE static Vec widen(const float* source) { return _mm512_loadu_ps(source); }
  SQ_ATTENTION_INLINE static Vec widen(const BFloat16* source) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  SQ_ATTENTION_INLINE static Vec widen(const Float16* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  }
  SQ_ATTENTION_INLINE static Vec widen(const int8_t* source) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
  }
};

}  // namespace
}  // namespace sq
