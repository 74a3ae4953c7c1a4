// What multiplies in fp32 for attention_avx512.cpp and, of few rows, for attention_avx512_bf16.cpp; each names its
// instruction set in SQ_ATTENTION_TARGET.
#pragma once

#include "attention_body.h"
#include "avx512.h"

namespace sq {
namespace {

struct Avx512 {
  using Vec = float __attribute__((vector_size(64)));
  using Operand = float;
  using Factor = Vec;
  static constexpr int kLanes = 16, kPair = 1, kRows = 6, kVecs = 4;

  SQ_ATTENTION_INLINE static Vec load(const float* operands) { return _mm512_loadu_ps(operands); }
  SQ_ATTENTION_INLINE static Vec broadcast(const float* operand) { return _mm512_set1_ps(*operand); }
  SQ_ATTENTION_INLINE static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
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
  SQ_ATTENTION_INLINE static void sums(const Vec* four, float* target) {
    const Vec low = Vec(_mm512_unpacklo_ps(four[0], four[1])) + Vec(_mm512_unpackhi_ps(four[0], four[1]));
    const Vec high = Vec(_mm512_unpacklo_ps(four[2], four[3])) + Vec(_mm512_unpackhi_ps(four[2], four[3]));
    const Vec all = Vec(_mm512_shuffle_ps(low, high, 0x44)) + Vec(_mm512_shuffle_ps(low, high, 0xEE));
    _mm_storeu_ps(target, add_quarters(all));
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
