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
  SQ_ATTENTION_INLINE static float sum(Vec value) { return _mm512_reduce_add_ps(value); }
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
